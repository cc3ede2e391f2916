"""LoRA layers of other libraries and of users, whose form is read off their parts and checked by what they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .adapter import Adapter
from .base import BaseWeight
from .bases import linear_base
from .bnb import Bnb4bitBase
from .forms import SWITCHES, Form, child_of, factor_of, fitting, is_switch, own_base
from .probe import at_hand
from .reader import NotLinear, Reader

__all__ = ["PlainLoRA"]

_PAIRS = (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"))
_BRANCH_PAIRS = (*_PAIRS, ("A", "B"))  # of a child with "lora" in its name
_SCALES = {"scaling": (0.0,), "scale": (0.0,), "lora_alpha": (1.0, 0.5, 0.0), "alpha": (1.0, 0.5, 0.0)}

# By layer: the shapes that it was asked with, and what reads it.
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
        holder = child_of(module, _branch(module) or "")
        pair = _pair(holder, _BRANCH_PAIRS)
        assert pair is not None
        factors = [_stored(holder, name) for name in pair]
        base_name = self._base_name(module, holder)
        weight = getattr(child_of(module, base_name), "weight", None)
        look = [tuple(factor.shape) for factor in factors], getattr(weight, "shape", None)
        known = _READ.get(module)
        if known is not None and known[0] == look:
            return known[1]
        forms = list(_forms(module, _branch(module) or "", pair, factors, base_name))
        if not at_hand(*factors, *child_of(module, base_name).parameters()):
            return PlainLoRA(forms[0])  # can't be asked: as the shapes have it
        form = fitting(module, forms)
        down = getattr(holder, form.down)
        if isinstance(down, nn.Linear) and down.bias is not None:
            raise ValueError(
                f"its {form.down} has a bias, which is in the gradient of {form.up} too, so that the weight's own "
                "can't be told from it; build it with bias=False"
            )
        reader = PlainLoRA(form)
        _READ[module] = look, reader
        return reader

    def parts(self, module: Any) -> Iterable[nn.Module]:
        branch = _branch(module)
        return () if branch is None else (child_of(module, branch),)

    def names(self, module: Any) -> Iterable[str]:
        return ("default",)

    def base(self, module: Any) -> BaseWeight:
        form = self._form(module)
        return own_base(module, form.base, form.shape, form.transposed)

    def enabled(self, module: Any) -> bool:
        own, cls = module.__dict__, type(module)  # looked up there, as modules search long for what they lack
        for name, off in SWITCHES.items():
            value = getattr(module, name) if hasattr(cls, name) else own.get(name, own["_buffers"].get(name))
            if is_switch(value) and bool(value) is off:
                return False
        return True

    def merged(self, module: Any) -> Sequence[str]:
        merged = getattr(module, "merged", False)
        return ("default",) if is_switch(merged) and merged else ()

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        form = self._form(module)
        holder = child_of(module, form.holder)
        params = factor_of(holder, form.down), factor_of(holder, form.up)
        A, B = (param.t() if turned else param for param, turned in zip(params, form.turned, strict=True))
        owner, attribute, power = form.scale
        scaling = self._scaling(getattr(child_of(module, owner), attribute)) / A.shape[0] ** power
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
            self._number = id(value), value._version, float(value.detach())
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
    holders = {name: child for name, child in children.items() if not isinstance(child, nn.ModuleDict)}  # PEFT's
    named = [name for name in holders if "lora" in name.lower() and _pair(holders[name], _BRANCH_PAIRS) is not None]
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


def _shapes(module: Any, name: str) -> list[tuple[tuple[int, int], bool]]:
    """What (m, n) of the base may be, and whether it is stored as (n, m)."""
    base = child_of(module, name)
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
            value = getattr(child_of(module, owner), name, None)
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
