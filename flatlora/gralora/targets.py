"""The arguments of `apply_gralora`: finding the layers by name, as PEFT does, and checking the numbers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from .. import checks
from ..layers.bases import linear_base


def check_numbers(r: int, k: int, alpha: float, hybrid_r: int, dropout: float) -> dict[str, Any]:
    """The numbers of `GraLoRALinear` as Python's own, by name; ValueError for one that is out of its range."""
    r, k = checks.integer("r", r, 1), checks.integer("k", k, 1)
    alpha, hybrid_r = checks.number("alpha", alpha, above=0), checks.integer("hybrid_r", hybrid_r, 0)
    alpha = int(alpha) if alpha.is_integer() else alpha  # as in PEFT's files
    return {"r": r, "k": k, "alpha": alpha, "hybrid_r": hybrid_r, "dropout": checks.number("dropout", dropout, below=1)}


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


def inside(name: str, modules: Iterable[str]) -> str | None:
    """The outermost of `modules` that the module `name` is or lies in."""
    return min((outer for outer in modules if f"{name}.".startswith(f"{outer}.")), key=len, default=None)


def find_saved(model: nn.Module, modules_to_save: Iterable[str] | None) -> list[str]:
    """Full names of the modules that are trained whole, without those that lie in others of them."""
    listed = _listed(model, "modules_to_save", modules_to_save or ())
    found = list(dict.fromkeys(name for names in listed.values() for name in names))
    return [name for name in found if inside(name, found) == name]


def find_targets(model: nn.Module, targets: str | Iterable[str], saved: list[str]) -> dict[str, nn.Module]:
    """The linear layers that `targets` names in PEFT's ways, without those in a saved module."""
    free = {name: module for name, module in model.named_modules() if name and inside(name, saved) is None}
    if not isinstance(targets, str):
        names = _in_list(model, targets, free)
    elif targets.lower() == "all-linear":
        names = _all_linear(model, free)
    else:
        names = _matching(model, targets, free)
    for name in names:
        if linear_base(free[name]) is None:
            raise ValueError(
                f"target module {name!r} is a {type(free[name]).__name__}; expected nn.Linear, Conv1D, Linear4bit or "
                "Linear8bitLt. Name the linear layers alone"
            )
    return {name: free[name] for name in names}


def _all_linear(model: nn.Module, free: dict[str, nn.Module]) -> list[str]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    names = [name for name, module in free.items() if linear_base(module) is not None and module is not head]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer but its output head; there is nothing to adapt")
    return names


def _matching(model: nn.Module, pattern: str, free: dict[str, nn.Module]) -> list[str]:
    try:
        names = [name for name in free if re.fullmatch(pattern, name)]
    except re.error as reason:
        raise ValueError(f"target_modules {pattern!r} is not a regular expression: {reason}") from reason
    if names:
        return names
    if _named(model, pattern):
        raise ValueError(
            f"target_modules {pattern!r} is a string, which is a regular expression for whole names, and none that may "
            f"be adapted is called so; pass a list: [{pattern!r}]"
        )
    raise _no_match(model, pattern, "target_modules, a regular expression for whole names,")


def _in_list(model: nn.Module, targets: Iterable[str], free: dict[str, nn.Module]) -> list[str]:
    wanted: set[str] = set()
    for entry, names in _listed(model, "target_modules", targets).items():
        if free.keys().isdisjoint(names):
            raise ValueError(
                f"target_modules entry {entry!r} lies in modules_to_save, whose modules are trained whole; name it in "
                "one of the two alone"
            )
        wanted.update(names)
    if not wanted:
        raise ValueError("target_modules is empty; name the layers to adapt, or pass 'all-linear'")
    return [name for name in free if name in wanted]


def _listed(model: nn.Module, argument: str, entries: Iterable[str]) -> dict[str, list[str]]:
    """The modules that each entry of a list names; ValueError for no list of names, or a name without modules."""
    given = list(entries) if isinstance(entries, Iterable) and not isinstance(entries, str) else None
    if given is None or not all(isinstance(entry, str) for entry in given):
        raise ValueError(f"{argument} must be a list of module names, got {entries if given is None else given!r}")
    found = {entry: _named(model, entry) for entry in given}
    if missing := next((entry for entry, names in found.items() if not names), None):
        raise _no_match(model, missing, f"{argument} entry")
    return found


def _named(model: nn.Module, entry: str) -> list[str]:
    """Names of the modules that are `entry`, or end in it after a dot."""
    return [name for name, _ in model.named_modules() if name == entry or name.endswith(f".{entry}")]


def _no_match(model: nn.Module, entry: str, what: str) -> ValueError:
    """The error for an `entry` that no module's name matches, with names near it."""
    names = [name for name, module in model.named_modules() if linear_base(module) is not None]
    endings = {name.rpartition(".")[2] for name in names}
    near = difflib.get_close_matches(entry, sorted({*names, *endings}), 5, 0.5) or sorted(endings)[:8]
    return ValueError(f"{what} {entry!r} matches no module of {type(model).__name__}; near it are: {', '.join(near)}")
