"""LoRA layers of other libraries and of users: their parts say how they may be read, and a test call which is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .adapter import Adapter, NotLinear, Reader
from .base import BaseWeight
from .bases import linear_base
from .bnb import Bnb4bitBase
from .probe import readable
from .specs import SWITCHES, LayerSpec, child_of, factor_of, is_switch, matching_spec, own_base, place_of, scale_of

_PAIRS = (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up"))
_BRANCH_PAIRS = (*_PAIRS, ("A", "B"))  # of a child with "lora" in its name
_SCALES = {"scaling": (0.0,), "scale": (0.0,), "lora_alpha": (1.0, 0.5, 0.0), "alpha": (1.0, 0.5, 0.0)}
# What layers call their base, in the order in which it is looked for; otherwise it is the one linear child.
_BASE_NAMES = ("base_layer", "linear", "base", "original", "original_layer", "org_module")

# By layer: the shapes with which it was called, and its reader.
_READ: WeakKeyDictionary[nn.Module, tuple[Any, PlainLoRA]] = WeakKeyDictionary()


class PlainLoRA(Reader):
    """Modules with one pair of factors, parameters or `nn.Linear` modules, or with a child that holds the pair."""

    def __init__(self, spec: Any = None):
        self.spec: LayerSpec = spec  # None in the table of readers
        self._number: tuple[int, int, float] | None = None

    def reads(self, module: nn.Module) -> bool:
        return _holder(module) is not None

    def of(self, module: Any) -> PlainLoRA:
        name: Any = _holder(module)
        holder = child_of(module, name)
        pair: Any = _pair(holder, _BRANCH_PAIRS)
        factors = [_stored(holder, factor) for factor in pair]
        base_name = _base_name(module, holder)
        base = child_of(module, base_name)
        shapes = [tuple(factor.shape) for factor in factors], getattr(getattr(base, "weight", None), "shape", None)
        known = _READ.get(module)
        if known is not None and known[0] == shapes:
            return known[1]
        specs = _specs(module, name, pair, factors, base_name)
        if not readable(*factors, *base.parameters()):
            return PlainLoRA(specs[0])  # it can't be called, so its shapes decide
        spec = matching_spec(module, specs)
        down = getattr(holder, spec.down)
        if isinstance(down, nn.Linear) and down.bias is not None:
            raise ValueError(
                f"its {spec.down} has a bias, which adds to the gradient of {spec.up}; build it with bias=False"
            )
        reader = PlainLoRA(spec)
        _READ[module] = shapes, reader
        return reader

    def parts(self, module: Any) -> Iterable[nn.Module]:
        holder = _holder(module)
        return (child_of(module, holder),) if holder else ()

    def base(self, module: Any) -> BaseWeight:
        return own_base(module, self.spec)

    def enabled(self, module: Any) -> bool:
        own, cls = module.__dict__, type(module)  # faster than getattr for attributes that a module does not have
        for name, off in SWITCHES.items():
            value = getattr(module, name) if hasattr(cls, name) else own.get(name, own["_buffers"].get(name))
            if is_switch(value) and bool(value) is off:
                return False
        return True

    def merged(self, module: Any) -> Sequence[str]:
        merged = getattr(module, "merged", False)
        return ("default",) if is_switch(merged) and merged else ()

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        spec = self.spec
        holder = child_of(module, spec.holder)
        params = factor_of(holder, spec.down), factor_of(holder, spec.up)
        A, B = (p.t() if transposed else p for p, transposed in zip(params, spec.factors_transposed, strict=True))
        scaling = self._scaling(scale_of(module, spec)) / A.shape[0] ** spec.scale[2]
        return [Adapter(name, A, B, scaling, None, None, *params)]

    def _scaling(self, value: Any) -> float:
        """A scale as a number. A tensor is read again only when it has been written to, as that stalls a GPU."""
        if not isinstance(value, Tensor):
            return float(value)
        if torch.compiler.is_compiling() and self._number is not None:
            return self._number[2]
        if self._number is None or value.device.type == "cpu" or self._number[:2] != (id(value), value._version):
            self._number = id(value), value._version, float(value.detach())
        return self._number[2]


def _pair(module: Any, pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Names of the factors that a module holds, as tensors or linear layers."""
    for pair in pairs:
        held = [getattr(module, name, None) for name in pair]
        if all(isinstance(part, nn.Linear) or (isinstance(part, Tensor) and part.dim() == 2) for part in held):
            return pair
    return None


def _holder(module: nn.Module) -> str | None:
    """The child that holds the factors, beside one linear layer; "" if the module holds them; None without any."""
    if _pair(module, _PAIRS) is not None:
        return ""
    holders = {name: child for name, child in module.named_children() if not isinstance(child, nn.ModuleDict)}  # PEFT's
    named = [name for name in holders if "lora" in name.lower() and _pair(holders[name], _BRANCH_PAIRS) is not None]
    if len(named) != 1:
        return None
    holder = holders[named[0]]
    linear = [name for name in _linear_children(module, holder) if name != named[0]]
    has_own = _linear_children(holder, holder) or (hasattr(holder, "weight") and _is_linear(holder))
    return named[0] if len(linear) == 1 and not has_own else None


def _base_name(module: Any, holder: Any) -> str:
    """The child that holds the base weight; "" for the module itself."""
    if hasattr(module, "enable_lora"):  # loralib's MergedLinear, LitGPT's LoRAQKVLinear
        raise NotLinear("several updates side by side, each of a part of the outputs")
    for name in _BASE_NAMES:
        if isinstance(getattr(module, name, None), nn.Module):
            return name
    if isinstance(module, _ConvNd | nn.Embedding):
        raise NotLinear(f"a {type(module).__name__}")
    if holder is module and isinstance(getattr(module, "weight", None), Tensor):
        return ""
    linear = _linear_children(module, holder)
    if len(linear) == 1:
        return linear[0]
    found = "several linear layers" if linear else "no linear layer"
    raise NotLinear(f"{found} beside its factors, none of them called {', '.join(_BASE_NAMES)}")


def _linear_children(module: nn.Module, holder: Any) -> list[str]:
    """Names of the children that look like linear layers and are none of the holder's factors."""
    factors = {id(getattr(holder, name, None)) for pair in _BRANCH_PAIRS for name in pair}
    return [name for name, child in module.named_children() if id(child) not in factors and _is_linear(child)]


def _is_linear(module: Any) -> bool:
    """Whether it looks like a linear layer that has no factors of its own."""
    if isinstance(module, _ConvNd | nn.Embedding) or _pair(module, _PAIRS) is not None:
        return False
    return _linear_class(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _linear_class(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _stored(holder: Any, name: str) -> Tensor:
    """The factor; ValueError unless it is a parameter or buffer."""
    store, key = place_of(holder, name)
    if store.get(key) is None:
        raise ValueError(
            f"its {name} is computed from other parameters at every pass (a parametrization), so it has no gradient; "
            "make it a parameter of the layer, as by torch.nn.utils.parametrize.remove_parametrizations"
        )
    return store[key]


def _shapes(module: Any, name: str) -> list[tuple[tuple[int, int], bool]]:
    """What (m, n) of the base may be, and whether it is stored as (n, m)."""
    base = child_of(module, name)
    if isinstance(base, _ConvNd | nn.Embedding):
        raise NotLinear(f"a {type(base).__name__}")
    weight: Any = getattr(base, "weight", None)
    stored = isinstance(weight, Tensor) and weight.dim() == 2 and not Bnb4bitBase.reads(base, weight)
    m, n = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if m is not None and n is not None:
        if stored and m == n and not name:
            return [((m, n), False), ((m, n), True)]
        return [((m, n), stored and tuple(weight.shape) != (m, n))]
    if not stored:
        raise NotLinear(f"a base, a {type(base).__name__}, that does not say its in_features and out_features")
    known = linear_base(base) if name and _linear_class(base) else None
    if known is not None:
        return [(known.shape, known.transposed)]
    return [(tuple(weight.shape), False), (tuple(weight.shape[::-1]), True)]


def _scales(module: Any, holder: str) -> list[tuple[str, str, float]]:
    """The attributes that may be the scale, as in `LayerSpec`."""
    found = []
    for name, powers in _SCALES.items():
        for owner in dict.fromkeys((holder, "")):
            value = getattr(child_of(module, owner), name, None)
            single = isinstance(value, Tensor) and value.numel() == 1
            if single or (isinstance(value, int | float) and not isinstance(value, bool)):
                found += [(owner, name, power) for power in powers]
    return found


def _specs(module: Any, holder: str, pair: tuple[str, str], factors: list[Tensor], base_name: str) -> list[LayerSpec]:
    """All ways to read it that its shapes allow, the likely ones first; ValueError if there is none."""
    shapes = _shapes(module, base_name)
    scales = _scales(module, holder)
    sized = dict(zip(pair, (tuple(factor.shape) for factor in factors), strict=True))
    orders = list(product((False, True), repeat=2))
    fits = []
    for ((m, n), transposed), (down, up), factors_transposed in product(shapes, (pair, pair[::-1]), orders):
        r, width = sized[down][::-1] if factors_transposed[0] else sized[down]
        height, q = sized[up][::-1] if factors_transposed[1] else sized[up]
        if (width, height, r) == (n, m, q):
            fits.append((holder, down, up, factors_transposed, base_name, transposed, (m, n)))
    if not fits:
        (m, n), _ = shapes[0]
        found = " and ".join(f"{name} {shape}" for name, shape in sized.items())
        raise ValueError(f"{found} do not fit the base weight's shape {(m, n)}; expected (r, {n}) and ({m}, r)")
    if not scales:
        raise ValueError(
            f"it holds {pair[0]} and {pair[1]} but does not say how they are scaled; give it a number as attribute "
            "`scaling` (or `alpha`, for alpha / r)"
        )
    return [LayerSpec(*fit, scale) for scale in scales for fit in fits]
