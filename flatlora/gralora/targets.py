"""What `apply_gralora` is asked for: finding the layers, as PEFT reads their names, and checking what fits them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable

from torch import nn

from ..layers.kinds import linear_base

__all__ = ["check_blocks", "check_numbers", "find_saved", "find_targets"]


def check_numbers(r: int, k: int, alpha: float, hybrid_r: int, dropout: float) -> None:
    """Raises ValueError for a number of `GraLoRALinear` that is out of its range."""
    for name, value, least in (("r", r, 1), ("k", k, 1), ("hybrid_r", hybrid_r, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}")
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")


def check_blocks(bases: dict[str, nn.Module], r: int, k: int) -> None:
    """Raises ValueError unless r and the sides of every base's weight are divisible by k."""
    sides = {name: weight.shape for name, base in bases.items() if (weight := linear_base(base)) is not None}
    fitting = math.gcd(r, *(side for shape in sides.values() for side in shape))
    fit = ", ".join(str(d) for d in range(1, fitting + 1) if fitting % d == 0)
    if r % k:
        raise ValueError(f"r = {r} is not divisible by k = {k}; here k may be {fit}")
    for name, (m, n) in sides.items():
        if m % k or n % k:
            raise ValueError(
                f"layer {name!r} has {n} inputs and {m} outputs, which k = {k} does not divide; with r = {r}, k may be "
                f"{fit} for all {len(sides)} layers"
            )


def named(model: nn.Module, entry: str) -> list[str]:
    """Names of the modules that are `entry`, or end in it after a dot."""
    return [name for name, _ in model.named_modules() if name == entry or name.endswith(f".{entry}")]


def no_match(model: nn.Module, entry: str, what: str) -> ValueError:
    """The error for an `entry` that no module's name matches, with names near it."""
    names = [name for name, module in model.named_modules() if linear_base(module) is not None]
    known = sorted({end for name in names for end in (name, name.rpartition(".")[2])})
    near = difflib.get_close_matches(entry, known, 5, 0.5) or sorted({name.rpartition(".")[2] for name in names})[:8]
    return ValueError(f"{what} {entry!r} matches no module of {type(model).__name__}; near it are: {', '.join(near)}")


def find_saved(model: nn.Module, modules_to_save: Iterable[str] | None) -> list[str]:
    """Full names of the modules that are trained whole."""
    found: list[str] = []
    for entry in modules_to_save or ():
        names = named(model, entry)
        if not names:
            raise no_match(model, entry, "modules_to_save entry")
        found += [name for name in names if name not in found]
    return found


def find_targets(model: nn.Module, targets: str | Iterable[str], saved: list[str]) -> dict[str, nn.Module]:
    """The linear layers that `targets` names in PEFT's ways, without those in a saved module."""
    modules = {name: module for name, module in model.named_modules() if name}
    free = [name for name in modules if not any(name == s or name.startswith(f"{s}.") for s in saved)]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        names = [name for name in free if linear_base(modules[name]) is not None and modules[name] is not head]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no linear layer but its output head; there is nothing to adapt"
            )
    elif isinstance(targets, str):
        try:
            names = [name for name in free if re.fullmatch(targets, name)]
        except re.error as reason:
            raise ValueError(f"target_modules {targets!r} is not a regular expression: {reason}") from reason
        if not names:
            raise no_match(model, targets, "target_modules, a regular expression for whole names,")
    else:
        wanted: set[str] = set()
        for entry in targets:
            matched = [name for name in named(model, entry) if name in free]
            if not matched:
                raise no_match(model, entry, "target_modules entry")
            wanted.update(matched)
        names = [name for name in free if name in wanted]
        if not names:
            raise ValueError("target_modules is empty; name the layers to adapt, or pass 'all-linear'")
    for name in names:
        if linear_base(modules[name]) is None:
            kind = type(modules[name]).__name__
            raise ValueError(
                f"target module {name!r} is a {kind}; expected nn.Linear, Conv1D, Linear4bit or Linear8bitLt. Name the "
                "linear layers alone"
            )
    return {name: modules[name] for name in names}
