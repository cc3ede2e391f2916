"""What a user may pass wrongly: numbers, options, modules, and checkpoints that belong to another model."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

_T = TypeVar("_T")
UNFREEZE = "unfreeze the adapter, for instance PEFT's with set_adapter(name) or from_pretrained(is_trainable=True)"
_MOST = 1e18  # the square of a σ or ρ must stay finite in float32


def number(name: str, value: Any, *, above: float | None = None, least: float = 0.0, below: float = math.inf) -> float:
    """`value` as a float if it is a finite number >= `least` (> `above` where given) and < `below`; else ValueError."""
    given, value = value, _item(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if real and (value >= least if above is None else value > above) and value < below and abs(value) <= _MOST:
        return float(value)
    low = f">= {least:g}" if above is None else f"> {above:g}"
    high = f" and < {below:g}" if below <= _MOST else f" and <= {_MOST:g}" if real and value > _MOST else ""
    raise ValueError(f"{name} must be a finite number {low}{high}, got {given!r}")


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int if it is an integer >= `least`; else ValueError."""
    item = _item(value)
    if isinstance(item, bool) or not isinstance(item, numbers.Integral) or item < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(item)


def some(names: list[str], most: int = 5) -> str:
    """The first names of a list that may be long, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _item(value: Any) -> Any:
    """A tensor without dimensions as a Python number; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value


def option(name: str, value: _T, options: tuple[_T, ...]) -> _T:
    """`value` if it is one of `options`; else ValueError."""
    if value not in options:
        raise ValueError(f"{name} must be {' or '.join(map(repr, options))}, got {value!r}")
    return value


def adapters(given: str | Iterable[str] | None, known: set[str]) -> set[str]:
    """The names in an argument `adapter`, all `known` ones for None; ValueError for others."""
    wanted = known if given is None else {given} if isinstance(given, str) else set(given)
    if not wanted <= known:
        raise ValueError(f"unknown adapter {sorted(wanted - known)}; the model has {sorted(known) or 'no adapters'}")
    return wanted


def module(value: Any) -> nn.Module:
    """`value` if it is a module; else TypeError."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(value).__name__}")
    return value


def built_optimizer(name: str, value: Any) -> Optimizer:
    """`value` if it is an optimizer instance; else TypeError."""
    if not isinstance(value, Optimizer):
        found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(
            f"{name} must be a torch.optim.Optimizer instance, got {found}; build it first: AdamW(params, lr=...)"
        )
    return value


def optimizer_cls(value: Any) -> Any:
    """`value` if it can be called to make an optimizer; else TypeError."""
    if not callable(value):
        raise TypeError(
            f"optimizer_cls must be a class such as torch.optim.AdamW, got an object: {type(value).__name__}"
        )
    return value


def state_fields(method: str, state: Any, *fields: str) -> None:
    """ValueError unless `state`, a method's part of a checkpoint, is a mapping that has `fields`."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the state_dict's {method} part is a {type(state).__name__}; expected a dict")
    if missing := [field for field in fields if field not in state]:
        raise ValueError(
            f"the state_dict's {method} part lacks {', '.join(missing)}; load one that this version of flatlora wrote"
        )


def same_layers(what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """ValueError unless a checkpoint's layers are the model's. The values, compared too, say what each layer is."""
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        raise ValueError(
            f"the state_dict is of another model: it has {len(theirs)} {what}, this one {len(ours)}; found in one "
            f"alone: {some(odd)}. Load the checkpoint that was saved with this model's adapters"
        )
    for name, own in ours.items():
        if theirs[name] != own:
            raise ValueError(
                f"the state_dict is of another model: {name!r} has other shapes or ranks, {theirs[name]}; here {own}"
            )
