"""LoRA layers of other libraries and of users, whose form is read off their parts and checked by what they compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .adapter import Adapter
from .base import BaseWeight, OpaqueBase
from .bases import base_weight, linear_base
from .bnb import Bnb4bitBase
from .probe import asked, at_hand, inputs, linear_part, misses, numbers
from .reader import NotLinear, Reader

__all__ = ["PlainLoRA"]

_PAIRS = (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"))
_BRANCH_PAIRS = (*_PAIRS, ("A", "B"))  # of a child with "lora" in its name
_SCALES = {"scaling": (0.0,), "scale": (0.0,), "lora_alpha": (1.0, 0.5, 0.0), "alpha": (1.0, 0.5, 0.0)}
# Attributes by which a layer tells that its adapter is off, and the value that says so.
_SWITCHES = {"enabled": False, "disable_adapters": True, "disabled": True}
# What a layer's output may differ by: rounding, and nothing that comes of another formula.
_EXACT, _ROUNDED = 3e-3, 3e-2


class Form(NamedTuple):
    """One way to read a layer: ``W0 + value/r^power · up·down``, with W0 (m, n), up (m, r) and down (r, n)."""

    holder: str  # the child that holds the factors; "" for the layer itself
    down: str
    up: str
    turned: tuple[bool, bool]  # whether down, up are stored transposed
    scale: tuple[str, str, float]  # whose attribute, its name, the power of r that divides it
    base: str  # the child that holds W0; "" for the layer itself
    transposed: bool  # whether W0 is stored as (n, m)
    shape: tuple[int, int]


_READ: WeakKeyDictionary[nn.Module, tuple[Any, PlainLoRA]] = WeakKeyDictionary()


class PlainLoRA(Reader):
    """Modules that hold one pair of factors, as parameters or `nn.Linear` modules, or whose child beside W0 does."""

    # What layers call the one that they adapt, in the order it is looked for; or else it is the one linear child.
    base_names = ("base_layer", "linear", "base", "original", "original_layer", "org_module")

    def __init__(self, form: Form | None = None):
        self.form = form
        self._number: tuple[int, int, float] | None = None

    def reads(self, module: nn.Module) -> bool:
        return _pair(module, _PAIRS) is not None or _branch(module) is not None

    def of(self, module: Any) -> PlainLoRA:
        holder = _child(module, _branch(module) or "")
        pair = _pair(holder, _BRANCH_PAIRS)
        assert pair is not None
        factors = [_stored(holder, name) for name in pair]
        base_name = self._base_name(module, holder)
        weight = getattr(_child(module, base_name), "weight", None)
        look = [tuple(factor.shape) for factor in factors], getattr(weight, "shape", None)
        known = _READ.get(module)
        if known is not None and known[0] == look:
            return known[1]
        forms = list(_forms(module, _branch(module) or "", pair, factors, base_name))
        tensors = *factors, *_child(module, base_name).parameters()
        if not at_hand(*tensors):
            return PlainLoRA(forms[0])  # can't be asked: as the shapes have it
        reader = PlainLoRA(_fitting(module, forms))
        _READ[module] = look, reader
        return reader

    def parts(self, module: Any) -> Iterable[nn.Module]:
        branch = _branch(module)
        return () if branch is None else (_child(module, branch),)

    def names(self, module: Any) -> Iterable[str]:
        return ("default",)

    def base(self, module: Any) -> BaseWeight:
        form = self._form(module)
        return _base(module, form.base, form.shape, form.transposed)

    def enabled(self, module: Any) -> bool:
        return not any(getattr(module, name, None) is off for name, off in _SWITCHES.items())

    def merged(self, module: Any) -> Sequence[str]:
        return ("default",) if getattr(module, "merged", False) else ()

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        form = self._form(module)
        holder = _child(module, form.holder)
        params = _param(holder, form.down), _param(holder, form.up)
        A, B = (param.t() if turned else param for param, turned in zip(params, form.turned, strict=True))
        owner, attribute, power = form.scale
        scaling = self._scaling(getattr(_child(module, owner), attribute)) / A.shape[0] ** power
        return [Adapter(name, A, B, scaling, None, None, *params)]

    def _form(self, module: Any) -> Form:
        form = self.form or self.of(module).form
        assert form is not None
        return form

    def _scaling(self, value: Any) -> float:
        """A scale that is a tensor is read again once it has been written to, as reading it stalls a GPU."""
        if not isinstance(value, Tensor):
            return float(value)
        if torch.compiler.is_compiling() and self._number is not None:
            return self._number[2]
        if self._number is None or value.device.type == "cpu" or self._number[:2] != (id(value), value._version):
            self._number = id(value), value._version, float(value)
        return self._number[2]

    def _base_name(self, module: Any, holder: Any) -> str:
        if hasattr(module, "enable_lora"):  # loralib's MergedLinear, LitGPT's LoRAQKVLinear
            raise NotLinear("several updates side by side, each of a part of the outputs")
        for name in self.base_names:
            if isinstance(getattr(module, name, None), nn.Module):
                return name
        if isinstance(module, _ConvNd | nn.Embedding):
            raise NotLinear(f"a {type(module).__name__}")
        if holder is module and isinstance(getattr(module, "weight", None), Tensor):
            return ""
        factors = {id(getattr(holder, name, None)) for pair in _BRANCH_PAIRS for name in pair}
        linear = [name for name, child in module.named_children() if id(child) not in factors and _is_linear(child)]
        if len(linear) == 1:
            return linear[0]
        raise NotLinear(
            f"{'several linear layers' if linear else 'no linear layer'} beside its factors, none of them called "
            + ", ".join(self.base_names)
        )


def _child(module: Any, name: str) -> Any:
    return getattr(module, name) if name else module


def _pair(module: Any, pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Names of the factors that a module holds, as tensors or linear layers."""
    for pair in pairs:
        held = [getattr(module, name, None) for name in pair]
        if all(isinstance(part, nn.Linear) or (isinstance(part, Tensor) and part.dim() == 2) for part in held):
            return pair
    return None


def _branch(module: nn.Module) -> str | None:
    """The one child that holds the factors of an update beside the one linear layer that it is added to."""
    if _pair(module, _PAIRS) is not None:
        return None
    children = dict(module.named_children())
    named = [name for name in children if "lora" in name.lower() and _pair(children[name], _BRANCH_PAIRS) is not None]
    linear = [name for name, child in children.items() if name not in named and _is_linear(child)]
    whole = len(named) == len(linear) == 1 and not any(_is_linear(child) for child in _others(children[named[0]]))
    return named[0] if whole else None


def _others(holder: nn.Module) -> list[nn.Module]:
    """A holder's children but for its factors; itself, where it has a weight of its own."""
    factors = {id(getattr(holder, name, None)) for pair in _BRANCH_PAIRS for name in pair}
    children = [child for child in holder.children() if id(child) not in factors]
    return [*children, holder] if hasattr(holder, "weight") else children


def _is_linear(module: Any) -> bool:
    """Whether it looks like a linear layer that has no factors of its own."""
    if isinstance(module, _ConvNd | nn.Embedding) or _pair(module, _PAIRS) is not None:
        return False
    return _linear_class(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _linear_class(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _param(holder: Any, name: str) -> Any:
    value = getattr(holder, name)
    return value.weight if isinstance(value, nn.Linear) else value


def _stored(holder: Any, name: str) -> Tensor:
    """The factor; ValueError unless it is a tensor that its module stores under its name."""
    value = getattr(holder, name)
    owner, own = (value, "weight") if isinstance(value, nn.Linear) else (holder, name)
    stored = owner._parameters.get(own)
    stored = owner._buffers.get(own) if stored is None else stored
    if stored is None:
        raise ValueError(
            f"its {name} is computed from other parameters at every pass (a parametrization), so that its gradient "
            "stays nowhere; make it a parameter of the layer, as by torch.nn.utils.parametrize.remove_parametrizations"
        )
    return stored


# --- the ways to read a layer ----------------------------------------------------------------------------------------


def _base(module: Any, name: str, shape: tuple[int, int], transposed: bool) -> BaseWeight:
    base = _child(module, name)
    # A layer that is its own base is asked as a whole, and must not be without its adapter.
    found = base_weight(base, shape, transposed, None if name else (type(base), True))
    if not name and isinstance(found, OpaqueBase):
        raise NotLinear("its own weight is not stored as floats, and it can't be asked without its adapter")
    return found


def _shapes(module: Any, name: str) -> list[tuple[tuple[int, int], bool]]:
    """What (m, n) of the base may be, and whether it is stored as (n, m)."""
    base = _child(module, name)
    if isinstance(base, _ConvNd | nn.Embedding):
        raise NotLinear(f"a {type(base).__name__}")
    weight: Any = getattr(base, "weight", None)
    readable = isinstance(weight, Tensor) and weight.dim() == 2 and not Bnb4bitBase.reads(base, weight)
    m, n = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if m is not None and n is not None:
        turned = [False, True] if readable and m == n and not name else [readable and tuple(weight.shape) != (m, n)]
        return [((m, n), each) for each in turned]
    if not readable:
        raise NotLinear(f"a base, a {type(base).__name__}, that does not say its in_features and out_features")
    known = linear_base(base) if name and _linear_class(base) else None
    if known is not None:
        return [(known.shape, known.transposed)]
    return [(tuple(weight.shape), False), (tuple(weight.shape[::-1]), True)]


def _scales(module: Any, holder: str) -> list[tuple[str, str, float]]:
    found = []
    for name, powers in _SCALES.items():
        for owner in dict.fromkeys((holder, "")):
            value = getattr(_child(module, owner), name, None)
            single = isinstance(value, Tensor) and value.numel() == 1
            if single or (isinstance(value, int | float) and not isinstance(value, bool)):
                found += [(owner, name, power) for power in powers]
    return found


def _forms(module: Any, holder: str, pair: tuple[str, str], factors: list[Tensor], base_name: str) -> Iterator[Form]:
    """All ways to read it that its shapes allow, the likely ones first; ValueError if there is none."""
    shapes = _shapes(module, base_name)
    scales = _scales(module, holder)
    sized = dict(zip(pair, (tuple(factor.shape) for factor in factors), strict=True))
    fitting = []
    for (m, n), transposed in shapes:
        for down, up in (pair, pair[::-1]):
            for turned in ((False, False), (False, True), (True, False), (True, True)):
                (r, width), (height, q) = (
                    shape[::-1] if each else shape for shape, each in zip((sized[down], sized[up]), turned, strict=True)
                )
                if (width, height, r) == (n, m, q):
                    fitting.append((down, up, turned, transposed, (m, n)))
    if not fitting:
        (m, n), _ = shapes[0]
        raise ValueError(
            f"{' and '.join(f'{name} {shape}' for name, shape in sized.items())} do not make an update of the base "
            f"weight's shape {(m, n)}; expected (r, {n}) and ({m}, r)"
        )
    if not scales:
        raise ValueError(
            f"it holds {pair[0]} and {pair[1]} but does not say how they are scaled; give it a number as attribute "
            "`scaling` (or `alpha`, for alpha / r)"
        )
    for scale in scales:
        for down, up, turned, transposed, shape in fitting:
            yield Form(holder, down, up, turned, scale, base_name, transposed, shape)


# --- which of them it computes ---------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a layer and its base made of the same inputs while random numbers stood in for the factors."""

    x: Tensor  # (rows, n)
    found: Tensor  # (rows, m), as are the base's by whether W0 is stored as (n, m)
    bases: dict[bool, Tensor]
    factors: dict[str, Tensor]
    rounded: bool  # to less than float32


def _fitting(module: Any, forms: list[Form]) -> Form:
    """The first form that the layer's output agrees with; ValueError if there is none."""
    least = math.inf, 0.0, 0.0
    answers: dict[int, Answer] = {}
    for form in forms:
        n = form.shape[1]
        if n not in answers:
            answers[n] = _ask(module, [other for other in forms if other.shape[1] == n])
        answer = answers[n]
        down, up = (
            answer.factors[name].t() if turned else answer.factors[name]
            for name, turned in zip((form.down, form.up), form.turned, strict=True)
        )
        update, found = answer.x @ down.t() @ up.t(), answer.found - answer.bases[form.transposed]
        scaling = _scaling_of(module, form, down.shape[0])
        if misses(found, scaling * update) < (_ROUNDED if answer.rounded else _EXACT) or not (scaling or found.any()):
            return form
        factor = float((found * update).sum() / update.square().sum())
        least = min(least, (misses(found, factor * update), factor, scaling))
    raise ValueError(_another_result(*least))


def _another_result(rest: float, factor: float, scaling: float) -> str:
    if rest < _ROUNDED and abs(factor) < _EXACT * abs(scaling):
        return (
            "it adds nothing of the product of its factors, though it does not say that its adapter is off; have it "
            "say so by an attribute `enabled` = False, or switch the adapter on while the optimizer is built"
        )
    if rest < _ROUNDED:
        return (
            f"it adds {factor:.4g} times the product of its factors and says {scaling:.4g}; set its attribute "
            "`scaling` to the number that multiplies the product"
        )
    return (
        "its output is not x·(W0 + s·B·A)ᵀ + bias in evaluation, with its factors as A and B, s its `scaling` or alpha "
        "/ r, and W0 its base's weight: methods would perturb another weight than the layer has (as in a DoRA of one's "
        "own, or with an activation after the product or between its factors). Let the adapted layer compute this and "
        "nothing else, and put the rest into a module around it"
    )


def _ask(module: Any, forms: list[Form]) -> Answer:
    """Sends numbers through the layer in a dtype, shape and autocast mode that it takes; ValueError if it has none."""
    (m, n), first = forms[0].shape, forms[0]
    holder = _child(module, first.holder)
    stored = {name: _param(holder, name) for name in (first.down, first.up)}
    device = stored[first.down].device
    weight = getattr(_child(module, first.base), "weight", None)
    known = [p.dtype for p in (weight, *stored.values()) if isinstance(p, Tensor) and p.is_floating_point()]
    dtypes = [dtype for dtype in dict.fromkeys((*known, torch.float32, torch.bfloat16)) if dtype.itemsize > 1]
    complaints: list[str] = []
    for autocast, dtype, lead in product((False, True), dtypes, ((), (1,))):
        x = inputs(n).to(device, dtype)
        try:
            with _undisturbed(module), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                outputs = {form.transposed: _base_output(module, form, x, lead) for form in forms}
                size = float(linear_part(outputs[first.transposed]).square().mean().sqrt()) or 1.0
                scaling = abs(_scaling_of(module, first, min(stored[first.down].shape))) or 1.0
                factors = {
                    first.down: numbers(1, *stored[first.down].shape) / n**0.5,
                    first.up: numbers(2, *stored[first.up].shape) * size / scaling,
                }
                factors = {name: factor.to(stored[name].dtype) for name, factor in factors.items()}
                with _in_place_of(holder, {name: factor.to(device) for name, factor in factors.items()}):
                    y = module.forward(x.view(*lead, -1, n))
        except NotLinear:
            raise
        except Exception as error:  # whatever its forward raises at inputs that it does not expect
            complaints.append(f"{type(error).__name__}: {error}")
            continue
        if not isinstance(y, Tensor):
            raise ValueError(
                f"it returns a {type(y).__name__}; expected one tensor (..., {m}) for an input (..., {n}). Let the "
                "adapted layer return its output alone, and a module around it the rest"
            )
        if y.shape == (*lead, len(x), m):
            whole = {name: factor.double() for name, factor in factors.items()}
            bases = {transposed: linear_part(out) for transposed, out in outputs.items()}
            return Answer(x[:-1].cpu().double(), linear_part(y), bases, whole, autocast or dtype.itemsize < 4)
        complaints.append(f"it makes {tuple(y.shape)} of an input {(*lead, len(x), n)}, expected (..., {m})")
    raise ValueError(
        f"it can't be called with its input as the only argument, one tensor (..., {n}), in any dtype: "
        f"{complaints[0]}. Let the adapted layer take its input first and have defaults for all else, and return one "
        f"tensor (..., {m})"
    )


def _base_output(module: Any, form: Form, x: Tensor, lead: tuple[int, ...]) -> Tensor:
    if form.base:
        return _child(module, form.base)(x.view(*lead, *x.shape))
    out = _base(module, "", form.shape, form.transposed).apply_rows(x).t()
    bias = getattr(module, "bias", None)
    return out + bias if isinstance(bias, Tensor) else out


def _scaling_of(module: Any, form: Form, rank: int) -> float:
    owner, attribute, power = form.scale
    return float(getattr(_child(module, owner), attribute)) / rank**power


@contextmanager
def _undisturbed(module: Any) -> Iterator[None]:
    """Within the context a layer adds its adapter and computes as in evaluation; nothing of it stays."""
    wanted = {"merged": False} | {name: not off for name, off in _SWITCHES.items()}
    before = {name: module.__dict__[name] for name in wanted if isinstance(module.__dict__.get(name), bool)}
    try:
        module.__dict__.update({name: wanted[name] for name in before})
        with asked(module):
            yield
    finally:
        module.__dict__.update(before)


@contextmanager
def _in_place_of(holder: Any, factors: dict[str, Tensor]) -> Iterator[None]:
    """Within the context the layer computes with other factors; the stored ones are not written to."""
    places: list[tuple[dict[str, Any], str, Any, Tensor]] = []
    for name, factor in factors.items():
        value = getattr(holder, name)
        owner, own = (value, "weight") if isinstance(value, nn.Linear) else (holder, name)
        store: dict[str, Any] = owner._parameters if own in owner._parameters else owner._buffers
        places.append((store, own, store[own], factor))
    try:
        for store, own, _, factor in places:
            store[own] = factor
        yield
    finally:
        for store, own, stored, _ in places:
            store[own] = stored
