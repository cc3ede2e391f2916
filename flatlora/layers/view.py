"""Finding adapted linear layers in any model, and one view of them all.

A layer's effective weight is ``W' = diag(a)·W0 + Σ_k s_k·diag(c_k)·B_k·A_k`` over its active adapters: `a` and `c` are
one for LoRA, and hold DoRA's row factors ``μ / ‖W0 + s·B·A‖`` where an adapter has a magnitude.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import checks
from .adapter import Adapter
from .base import OFFLOADED, BaseWeight, hooked
from .bases import base_weight
from .kinds import reader_of
from .probe import at_hand
from .reader import NotLinear, Reader

__all__ = ["LoRALayer", "fusable", "lora_layers", "plain_name", "refuse_fsdp1"]

logger = logging.getLogger("flatlora")

_WRAPPER_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """A module's name without the parts that DDP, FSDP, checkpointing or `torch.compile` put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


class LoRALayer:
    """A linear layer with low-rank adapters. Holds the module and looks every tensor up when asked.

    Attributes:
        name: the module's name in the model, without the parts that DDP, FSDP or `torch.compile` add.
        module: the adapter layer itself.
        base: its frozen weight, as the layer stores it at present.
        shape: (m, n) = (out_features, in_features).
        names: the adapters that this view was asked for; `adapters()` yields all active ones.
        is_peft: whether the module is PEFT's.
    """

    def __init__(self, name: str, module: nn.Module, base: BaseWeight, names: frozenset[str]):
        # A module's kind does not change, and asking it takes longer than the rest of `adapters()`.
        reader = reader_of(module)
        if reader is None:
            raise ValueError(f"module {name!r}, a {type(module).__name__}, holds no adapters that can be read")
        self.name = name
        self.module: Any = module
        self.names = names
        self.shape = base.shape
        self.is_peft = reader.is_peft
        self._reader = reader.of(module)
        # What was found out about a base is kept; an opaque one whose values are elsewhere yet could not be asked.
        unasked = base.kind == "opaque" and not at_hand(*base.module.parameters())
        self._known = None if unasked else (type(base.module).forward, base.kind == "float")
        self._base = base.module, base.shape, base.transposed

    @property
    def base(self) -> BaseWeight:
        return base_weight(*self._base, self._known)

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are folded into the base weight at present."""
        return tuple(self._reader.merged(self.module))

    @property
    def active(self) -> bool:
        """Whether one of the adapters asked for takes part in the layer's output at present."""
        reader, module, names = self._reader, self.module, self.names
        if not reader.enabled(module):
            return False
        return not names.isdisjoint(reader.active(module)) or not names.isdisjoint(reader.merged(module))

    @property
    def trained(self) -> bool:
        """Whether an adapter asked for that the layer adds at present, unmerged, has a factor that is trained."""
        return any(adapter.trained for adapter in self.adapters() if adapter.name in self.names)

    def all_adapters(self) -> list[Adapter]:
        """Every adapter asked for, active or not."""
        reader, module, shape = self._reader, self.module, self.shape
        return [adapter for name in sorted(self.names) for adapter in reader.adapters(module, name, shape)]

    def adapters(self) -> list[Adapter]:
        """The adapters that the layer adds to its base weight at present; none while they are merged or disabled."""
        reader, module, shape = self._reader, self.module, self.shape
        if reader.merged(module) or not reader.enabled(module):
            return []
        return [adapter for name in reader.active(module) for adapter in reader.adapters(module, name, shape)]

    def adapters_named(self, scalings: Mapping[str, float]) -> list[Adapter]:
        """The adapters of these names, asked for or not, in their order and with these scalings."""
        reader, module, shape = self._reader, self.module, self.shape
        found = [adapter for name in scalings for adapter in reader.adapters(module, name, shape)]
        return [a if a.scaling == scalings[a.name] else replace(a, scaling=scalings[a.name]) for a in found]

    def ranks(self) -> dict[str, int]:
        """The rank of every adapter asked for; of a hybrid GraLoRA layer that of both its parts together."""
        ranks: dict[str, int] = {}
        for adapter in self.all_adapters():
            ranks[adapter.name] = ranks.get(adapter.name, 0) + adapter.rank
        return ranks

    def __repr__(self) -> str:
        m, n = self.shape
        return f"LoRALayer({self.name!r}, {n} -> {m}, {self.base.kind} base, adapters {sorted(self.names)})"


def lora_layers(model: nn.Module, adapter: str | Iterable[str] | None = None) -> list[LoRALayer]:
    """Finds every adapted linear layer of a model.

    Understood are PEFT's LoRA, rsLoRA and DoRA layers, GraLoRA layers, this library's and PEFT's, and layers of other
    libraries and of one's own. The base may be `nn.Linear`, `Conv1D`, bitsandbytes' `Linear4bit` or `Linear8bitLt`, or
    any other layer that can be applied to inputs and says its `in_features` and `out_features` (AWQ, GPTQ, HQQ,
    torchao, 8-bit floats). Its stored floats are taken for its weight where it multiplies by them and by nothing else.

    What is asked of a layer of one's own. It holds `lora_A` and `lora_B` (or `lora_a` and `lora_b`, `lora_down` and
    `lora_up`), 2-D tensors or `nn.Linear` modules, beside a linear base: its own `weight`, a child named `base_layer`,
    `linear`, `base` or `original`, or its one linear child. Or the factors are in a child whose name contains "lora",
    beside the one linear child. It says its scaling as a number or tensor `scaling` or `scale`, or as `alpha` or
    `lora_alpha`, for alpha / r, alpha / √r or alpha. Called with one tensor (..., n), its input, it returns one tensor
    (..., m), ``x·(W0 + s·B·A)ᵀ + bias`` in evaluation, and nothing else: each such layer is asked so once, with random
    numbers for A and B, and is as before afterwards. Which factor comes first and what is stored transposed is found
    out that way too. While its adapter is off, an attribute says so: `enabled` is False, or `disable_adapters` or
    `disabled` is True; and `merged` is True while the adapter is folded into the base weight. Such a layer is left
    alone for as long.

    A factor that several layers share has the sum of their gradients, of which no layer's own can be told. GGPO and
    LoRASAM then use the gradient of the layer's other factor alone, as beside a frozen one.

    Adapters of other kinds (embeddings, convolutions, experts, several updates side by side, token-dependent variants)
    are not linear layers with one weight update; they are left out and named once in a log line, with the reason.

    Args:
        model: any module, also one wrapped by DDP, FSDP or `torch.compile`.
        adapter: name or names of the adapters to look at; None for all.

    Raises:
        ValueError: no adapted linear layer, an adapter name the model does not have, a layer without a scaling or
            that computes something else, both factors shared with other layers, weights that Accelerate keeps off the
            model between passes, a model that FSDP1 or DeepSpeed's ZeRO stage 3 shards.
    """
    refuse_fsdp1(checks.module(model))
    wanted = None if adapter is None else {adapter} if isinstance(adapter, str) else set(adapter)
    found, skipped, known = _search(model, wanted)
    if wanted is not None and not wanted <= known:
        raise ValueError(f"unknown adapter {sorted(wanted - known)}; the model has {sorted(known) or 'no adapters'}")
    if not found:
        others = f" (adapters that are not linear layers: {_some(skipped)})" if skipped else ""
        raise ValueError(
            f"{type(model).__name__} has no adapted linear layer{others}; add adapters first, for example with "
            "peft.get_peft_model(model, LoraConfig(target_modules='all-linear'))"
        )
    if skipped:
        _tell_once(f"left alone, as their adapters are not linear layers: {_some(skipped)}")
    return found


def refuse_fsdp1(model: nn.Module) -> None:
    """ValueError if FullyShardedDataParallel has made the adapters parts of flat parameters."""
    named = model.named_parameters()
    flat = [name for name, p in named if name.endswith("_flat_param") or getattr(p, "_fsdp_flattened", False)]
    if flat:
        raise ValueError(
            f"{type(model).__name__} is sharded by FullyShardedDataParallel (FSDP1), which flattens {len(flat)} of its "
            "parameters; shard it by FSDP2 instead: torch's fully_shard, or fsdp_version: 2 in Accelerate's settings"
        )


def _search(model: nn.Module, wanted: set[str] | None) -> tuple[list[LoRALayer], list[str], set[str]]:
    """The layers with a wanted adapter, names of those whose adapters can't be read, and all adapters' names."""
    found: list[LoRALayer] = []
    skipped: list[str] = []
    known: set[str] = set()
    taken: set[str] = set()
    parts: set[nn.Module] = set()
    for raw_name, module in model.named_modules():
        reader = None if module in parts else reader_of(module)
        if reader is None:
            continue
        parts.update(reader.parts(module))
        name, available = plain_name(raw_name), set(reader.names(module))
        name = raw_name if name in taken else name  # `module.fc` beside `fc`
        taken.add(name)
        known |= available
        names = available if wanted is None else available & wanted
        if not names:
            continue
        try:
            layer = _read(name, module, reader.of(module), names)
        except NotLinear as reason:
            skipped.append(f"{name} ({reason})")
            continue
        except ValueError as error:
            raise ValueError(f"layer {name!r}, a {type(module).__name__}: {error}") from error.__cause__
        found.append(layer)
    _refuse_shared(found)
    return found, skipped, known


def _read(name: str, module: nn.Module, reader: Reader, names: set[str]) -> LoRALayer:
    """The layer, seen through those of the adapters that can be read.

    Raises:
        NotLinear: there is none.
        ValueError: they can't be trained as the layer is at present.
    """
    base = reader.base(module)
    readable = frozenset(one for one in names if reader.adapters(module, one, base.shape))
    if not readable:
        raise NotLinear(f"{', '.join(sorted(names))}: of another kind")
    layer = LoRALayer(name, module, base, readable)
    if (fault := base.fault()) is not None:
        raise ValueError(fault)
    adapters = layer.all_adapters()
    for tensor in (t for adapter in adapters for t in (adapter.A, adapter.B)):
        if tensor.is_meta and any(hasattr(part, "_hf_hook") for part in layer.module.modules()):
            raise ValueError(OFFLOADED)
    if base.kind == "8bit" and any(adapter.magnitude is not None for adapter in adapters):
        raise ValueError(
            "DoRA over a bitsandbytes 8-bit weight can't be trained: PEFT's own forward fails there from its second "
            "pass on. Use plain LoRA over it, or DoRA over a 4-bit or float weight"
        )
    return layer


def _refuse_shared(layers: list[LoRALayer]) -> None:
    """ValueError where layers have both factors in common: of neither is the gradient one layer's own."""
    adapters = [(layer.name, adapter) for layer in layers for adapter in layer.all_adapters() if adapter.trained]
    users: dict[int, list[str]] = {}
    for name, adapter in adapters:
        for param in (adapter.A_param, adapter.B_param):
            users.setdefault(id(param), []).append(name)
    for name, adapter in adapters:
        both = [users[id(param)] for param in (adapter.A_param, adapter.B_param)]
        if all(len(names) > 1 for names in both):
            raise ValueError(
                f"layer {name!r} shares both factors of its adapter, A with {_some(both[0])} and B with "
                f"{_some(both[1])}: their gradients are sums over these layers, of which no layer's own can be told; "
                "share A alone or B alone, or use one module in all places"
            )


@functools.cache
def _tell_once(message: str) -> None:
    logger.warning(message)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@functools.cache
def _peft_linear_forwards() -> frozenset[Any]:
    from peft.tuners.lora import bnb, layer

    kinds = [layer.Linear, getattr(bnb, "Linear4bit", None), getattr(bnb, "Linear8bitLt", None)]
    return frozenset(kind.forward for kind in kinds if kind is not None)


def fusable(layer: LoRALayer, base: BaseWeight, adapters: list[Adapter], x: Tensor) -> bool:
    """Whether the layer has `add_update`, or is PEFT's plain LoRA right over a known base with nobody listening in."""
    module: Any = layer.module
    if not base.fusable(x):
        return False
    if hasattr(type(module), "add_update"):  # of the class, as modules search long for what they lack
        return True
    if not layer.is_peft or not adapters or type(module).forward not in _peft_linear_forwards():
        return False
    if module.base_layer is not base.module:  # but another adapter's layer
        return False
    for adapter in adapters:
        name = adapter.name
        if name in module.lora_variant or module.lora_bias[name] or adapter.A.dtype != adapters[0].A.dtype:
            return False
        factors = (module.lora_A[name], module.lora_B[name])
        if any(type(part) is not nn.Linear or hooked(part) for part in factors) or hooked(module.lora_dropout[name]):
            return False
    return True
