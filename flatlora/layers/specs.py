"""Ways to read a LoRA layer of unknown make, and which of them its output agrees with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import NotLinear
from .base import BaseWeight, OpaqueBase
from .bases import base_weight
from .probe import inputs, linear_part, misses, numbers, probing

# Attributes by which a layer says that its adapter is off, and the value that says so.
SWITCHES = {"enabled": False, "disable_adapters": True, "disabled": True}
_EXACT, _ROUNDED = 1e-2, 3e-2  # the largest relative error that is rounding and no other formula

_Places = list[tuple[dict[str, Any], str, Tensor]]


class LayerSpec(NamedTuple):
    """One way to read a layer: ``W0 + value/r^power · up·down``, with W0 (m, n), up (m, r) and down (r, n)."""

    holder: str  # the child that holds the factors; "" for the layer itself
    down: str
    up: str
    factors_transposed: tuple[bool, bool]  # whether down, up are stored transposed
    base: str  # the child that holds W0; "" for the layer itself
    transposed: bool  # whether W0 is stored as (n, m)
    shape: tuple[int, int]
    scale: tuple[str, str, float]  # whose attribute, its name, the power of r that divides it


def child_of(module: Any, name: str) -> Any:
    """The child of that name; the module itself for ""."""
    return getattr(module, name) if name else module


def factor_of(holder: Any, name: str) -> Any:
    """A factor's tensor; of a linear layer its weight."""
    value = getattr(holder, name)
    return value.weight if isinstance(value, nn.Linear) else value


def place_of(holder: Any, name: str) -> tuple[dict[str, Any], str]:
    """The dict of parameters or buffers that stores a factor, and its key there."""
    value = getattr(holder, name)
    owner, key = (value, "weight") if isinstance(value, nn.Linear) else (holder, name)
    return (owner._parameters if key in owner._parameters else owner._buffers), key


def scale_of(module: Any, spec: LayerSpec) -> Any:
    """The number or tensor by which the layer says its scaling."""
    owner, attribute, _ = spec.scale
    return getattr(child_of(module, owner), attribute)


def is_switch(value: Any) -> bool:
    """Whether it is a bool, or a number or tensor that may stand for one."""
    return isinstance(value, int) or type(value).__name__ in ("bool_", "bool") or isinstance(value, Tensor)


def own_base(module: Any, spec: LayerSpec) -> BaseWeight:
    """The layer's base weight (m, n)."""
    base = child_of(module, spec.base)
    # A layer that is its own base can't be called without its adapter.
    known = None if spec.base else (type(base).forward, True)
    found = base_weight(base, spec.shape, spec.transposed, known)
    if not spec.base and isinstance(found, OpaqueBase):
        raise NotLinear("its own weight is not stored as floats, and it can't be called without its adapter")
    return found


class ProbeResult(NamedTuple):
    """The outputs of a layer and of its base for the same inputs, with random numbers for the factors."""

    x: Tensor  # (rows, n)
    found: Tensor  # (rows, m), as are the base's by whether W0 is stored as (n, m)
    bases: dict[bool, Tensor]
    factors: dict[str, Tensor]
    rounded: bool  # to less than float32


def matching_spec(module: Any, specs: list[LayerSpec]) -> LayerSpec:
    """The first spec that the layer's output agrees with; ValueError if there is none."""
    least = math.inf, 0.0, 0.0
    results: dict[int, ProbeResult] = {}
    for spec in specs:
        n = spec.shape[1]
        if n not in results:
            results[n] = _probe(module, [other for other in specs if other.shape[1] == n])
        result = results[n]
        down, up = (
            result.factors[name].t() if transposed else result.factors[name]
            for name, transposed in zip((spec.down, spec.up), spec.factors_transposed, strict=True)
        )
        update, found = result.x @ down.t() @ up.t(), result.found - result.bases[spec.transposed]
        scaling = _scaling_of(module, spec, down.shape[0])
        if not (scaling or found.any()):
            if len(specs) > 1:
                raise ValueError(
                    "its scaling is 0 at present, so that it can't be told which of its factors comes first, or how "
                    "they are scaled; build the optimizer while it is another number"
                )
            return spec
        if misses(found, scaling * update) < (_ROUNDED if result.rounded else _EXACT):
            return spec
        factor = float((found * update).sum() / update.square().sum())
        least = min(least, (misses(found, factor * update), factor, scaling))
    raise ValueError(_mismatch(*least))


def _mismatch(rest: float, factor: float, scaling: float) -> str:
    if rest < _ROUNDED and abs(factor) < _EXACT * abs(scaling):
        return (
            "it adds nothing of the product of its factors, though it does not say that its adapter is off; set its "
            "attribute `enabled` to False, or switch the adapter on while the optimizer is built"
        )
    if rest < _ROUNDED:
        return (
            f"it adds {factor:.4g} times the product of its factors and says {scaling:.4g}; set its attribute "
            "`scaling` to the number that multiplies the product"
        )
    return (
        "its output in evaluation is not x·(W0 + s·B·A)ᵀ + bias, with its factors as A and B, s its `scaling` or "
        "alpha / r, and W0 its base's weight. A DoRA of one's own, or an activation after the product or between its "
        "factors, is not supported. Let the adapted layer compute this alone, and a module around it the rest"
    )


def _probe(module: Any, specs: list[LayerSpec]) -> ProbeResult:
    """Calls the layer with a dtype, shape and autocast mode that it takes; ValueError if there is none."""
    (m, n), first = specs[0].shape, specs[0]
    holder = child_of(module, first.holder)
    weight = getattr(child_of(module, first.base), "weight", None)
    stored = (weight, factor_of(holder, first.down), factor_of(holder, first.up))
    known = [p.dtype for p in stored if isinstance(p, Tensor) and p.is_floating_point()]
    dtypes = [dtype for dtype in dict.fromkeys((*known, torch.float32, torch.bfloat16)) if dtype.itemsize > 1]
    complaints: list[str] = []
    for autocast, dtype, lead in product((False, True), dtypes, ((), (1,))):
        x = inputs(n).to(stored[1].device, dtype)
        try:
            with _adding_adapter(module), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                y, bases, factors = _outputs(module, specs, x, lead)
        except NotLinear:
            raise
        except Exception as error:  # whatever its forward raises for inputs that it does not expect
            complaints.append(f"{type(error).__name__}: {error}")
            continue
        if not isinstance(y, Tensor):
            raise ValueError(
                f"it returns a {type(y).__name__}; expected one tensor (..., {m}) for an input (..., {n}). Let the "
                "adapted layer return its output alone, and a module around it the rest"
            )
        if y.shape == (*lead, len(x), m):
            rounded = autocast or min(one.itemsize for one in (*known, dtype)) < 4
            return ProbeResult(x[:-1].cpu().double(), linear_part(y), bases, factors, rounded)
        complaints.append(f"it makes {tuple(y.shape)} of an input {(*lead, len(x), n)}, expected (..., {m})")
    raise ValueError(
        f"it can't be called with its input as the only argument, one tensor (..., {n}), in any dtype: "
        f"{complaints[0]}. Let the adapted layer take its input first, with defaults for all else, and return one "
        f"tensor (..., {m})"
    )


def _outputs(
    module: Any, specs: list[LayerSpec], x: Tensor, lead: tuple[int, ...]
) -> tuple[Any, dict[bool, Tensor], dict[str, Tensor]]:
    """The layer's output, `ProbeResult.bases` and `ProbeResult.factors`.

    The factors are sized so that the update is as large as the base's output, for the rounding of neither to matter.
    """
    first = specs[0]
    sides = {spec.transposed: spec for spec in reversed(specs)}
    outputs = {transposed: _base_output(module, spec, x, lead) for transposed, spec in sides.items()}
    size = float(outputs[first.transposed].double().square().mean().sqrt()) or 1.0
    holder = child_of(module, first.holder)
    down, up = factor_of(holder, first.down), factor_of(holder, first.up)
    scaling = abs(_scaling_of(module, first, min(down.shape))) or 1.0
    factors = {
        first.down: (numbers(1, *down.shape) / x.shape[1] ** 0.5).to(down.dtype),
        first.up: (numbers(2, *up.shape) * size / scaling).to(up.dtype),
    }
    places = [(*place_of(holder, name), factor.to(x.device)) for name, factor in factors.items()]
    with _replaced(places + _other_parameters(module, first, (down, up))):
        y = module.forward(x.view(*lead, *x.shape))
    bases = {transposed: linear_part(out) for transposed, out in outputs.items()}
    return y, bases, {name: factor.double() for name, factor in factors.items()}


def _base_output(module: Any, spec: LayerSpec, x: Tensor, lead: tuple[int, ...]) -> Tensor:
    if spec.base:
        return child_of(module, spec.base)(x.view(*lead, *x.shape))
    out = own_base(module, spec).apply_rows(x).t()
    bias = getattr(module, "bias", None)
    return out + bias if isinstance(bias, Tensor) else out


def _scaling_of(module: Any, spec: LayerSpec, rank: int) -> float:
    """What multiplies the product of the factors."""
    value = scale_of(module, spec)
    return float(value.detach() if isinstance(value, Tensor) else value) / rank ** spec.scale[2]


def _other_parameters(module: Any, spec: LayerSpec, factors: tuple[Tensor, Tensor]) -> _Places:
    """Random numbers for all else that is trained in the layer, such as a gate, which may be neutral at its start."""
    base = list(child_of(module, spec.base).parameters(recurse=bool(spec.base)))
    known = {id(p) for p in (*factors, *base, scale_of(module, spec))}
    return [
        (part._parameters, name, numbers(3, *p.shape).to(p.device, p.dtype))
        for part in module.modules()
        for name, p in part._parameters.items()
        if p is not None and p.requires_grad and id(p) not in known
    ]


@contextmanager
def _adding_adapter(module: Any) -> Iterator[None]:
    """Within the context a layer adds its adapter and computes as in evaluation; it is restored afterwards."""
    wanted = {"merged": False} | {name: not off for name, off in SWITCHES.items()}
    with probing(module):
        module.__dict__.update({name: on for name, on in wanted.items() if is_switch(module.__dict__.get(name))})
        yield


@contextmanager
def _replaced(places: _Places) -> Iterator[None]:
    """Within the context these dicts hold other tensors under these names."""
    stored = [store[name] for store, name, _ in places]
    try:
        for store, name, tensor in places:
            store[name] = tensor
        yield
    finally:
        for (store, name, _), before in zip(places, stored, strict=True):
            store[name] = before
