"""Finding adapted linear layers in any model, and one view of them all.

A layer's effective weight is ``W' = diag(a)·W0 + Σ_k s_k·diag(c_k)·B_k·A_k`` over its active adapters, where a and c_k
are 1 for LoRA and row factors ``μ / ‖W0 + s·B·A‖`` for DoRA.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .. import checks
from .adapter import Adapter, NotLinear, Reader
from .base import OFFLOADED, BaseWeight, hooked
from .bases import base_weight
from .kinds import reader_of
from .probe import readable

logger = logging.getLogger("flatlora")

_WRAPPER_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """A module's name without the parts that DDP, FSDP, checkpointing or `torch.compile` put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


class LoRALayer:
    """A linear layer with low-rank adapters. It holds the module, and looks tensors up whenever they are needed.

    Attributes:
        name: the module's name in the model, without the parts that DDP, FSDP or `torch.compile` add.
        module: the adapter layer.
        base: its frozen weight, as the layer stores it at present.
        shape: (m, n) = (out_features, in_features).
        names: the adapters that were asked for.
        is_peft: whether the module is PEFT's.
    """

    def __init__(self, name: str, module: nn.Module, base: BaseWeight, names: frozenset[str]):
        reader = reader_of(module)  # once, as it takes longer than the rest of `adapters()`
        if reader is None:
            raise ValueError(f"module {name!r}, a {type(module).__name__}, holds no adapters that can be read")
        self.name = name
        self.module: Any = module
        self.names = names
        self.shape = base.shape
        self.is_peft = reader.is_peft
        self._reader = reader.of(module)
        # An opaque base whose values are elsewhere could not be tried yet.
        untried = base.kind == "opaque" and not readable(*base.module.parameters())
        self._known = None if untried else (type(base.module).forward, base.kind == "float")
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
        return reader.enabled(module) and not names.isdisjoint((*reader.active(module), *reader.merged(module)))

    @property
    def trained(self) -> bool:
        """Whether the layer adds, at present and unmerged, an adapter asked for that requires a gradient."""
        return any(adapter.trained for adapter in self.adapters() if adapter.name in self.names)

    def all_adapters(self) -> list[Adapter]:
        """Every adapter asked for, active or not."""
        return self._named(sorted(self.names))

    def adapters(self) -> list[Adapter]:
        """The adapters that the layer adds to its base weight at present; none while they are merged or disabled."""
        reader, module = self._reader, self.module
        if reader.merged(module) or not reader.enabled(module):
            return []
        return self._named(reader.active(module))

    def adapters_named(self, scalings: Mapping[str, float]) -> list[Adapter]:
        """The adapters of these names, asked for or not, in their order and with these scalings."""
        found = self._named(scalings)
        return [a if a.scaling == scalings[a.name] else replace(a, scaling=scalings[a.name]) for a in found]

    def _named(self, names: Iterable[str]) -> list[Adapter]:
        found: list[Adapter] = []
        for name in names:  # no comprehension: torch 2.6 compiles it apart and then reads its iterator after the end
            found += self._reader.adapters(self.module, name, self.shape)
        return found

    def ranks(self) -> dict[str, int]:
        """The rank of every adapter asked for; of a hybrid GraLoRA layer that of both its parts together."""
        ranks: dict[str, int] = {}
        for adapter in self.all_adapters():
            ranks[adapter.name] = ranks.get(adapter.name, 0) + adapter.rank
        return ranks

    def __repr__(self) -> str:
        m, n = self.shape
        return f"LoRALayer({self.name!r}, {n} -> {m}, {self.base.kind} base, adapters {sorted(self.names)})"


def seen_through(layer: LoRALayer, names: Iterable[str]) -> LoRALayer:
    """The same layer, with these names for the adapters asked for."""
    return LoRALayer(layer.name, layer.module, layer.base, frozenset(names))


def lora_layers(model: nn.Module, adapter: str | Iterable[str] | None = None) -> list[LoRALayer]:
    """Finds every adapted linear layer of a model.

    These are PEFT's LoRA, rsLoRA, DoRA and GraLoRA layers, `GraLoRALinear`, and layers of other libraries and of your
    own. The base may be `nn.Linear`, `Conv1D`, bitsandbytes' `Linear4bit` or `Linear8bitLt`, or any other layer that
    can be called and says its `in_features` and `out_features` (AWQ, GPTQ, HQQ, torchao, 8-bit floats).

    A layer of your own

    - holds `lora_A` and `lora_B` (or `lora_a` and `lora_b`, `lora_down` and `lora_up`), 2-D tensors or `nn.Linear`
      modules, or has one child that does, with "lora" in its name;
    - has a linear base: its own `weight`, a child named `base_layer`, `linear`, `base` or `original`, or its one linear
      child;
    - has a number or tensor `scaling` or `scale`, or an `alpha` or `lora_alpha` for alpha / r, alpha / √r or alpha;
    - returns ``x·(W0 + s·B·A)ᵀ + bias`` in evaluation, one tensor (..., m), when called with x (..., n) alone;
    - says so while its adapter is off, by `enabled` = False, `disable_adapters` = True or `disabled` = True, and while
      it is folded into the base weight, by `merged` = True. It is left alone for as long.

    Each such layer is called once with random numbers for A and B, which shows the order of the factors and what is
    stored transposed. It is then as before.

    The gradient of a factor that several layers share is a sum over them; GGPO and LoRASAM use the other factor's.

    Adapters that are no low-rank update of one linear layer (embeddings, convolutions, experts, several updates side by
    side, token-dependent variants) are left out; a warning names them with the reason.

    Args:
        model: any module, also one wrapped by DDP, FSDP or `torch.compile`.
        adapter: name or names of the adapters to look at; None for all.

    Raises:
        ValueError: no adapted linear layer, an adapter name the model does not have, a layer without a scaling or
            that computes something else, both factors shared with other layers, weights that Accelerate keeps off the
            model between passes, a model that FSDP1 or DeepSpeed's ZeRO stage 3 shards.
    """
    refuse_fsdp1(checks.module(model))
    modules = _adapter_modules(model)
    wanted = checks.adapters(adapter, {name for _, module, reader in modules for name in reader.names(module)})
    found, skipped = [], []
    for name, module, reader in modules:
        if names := wanted.intersection(reader.names(module)):
            try:
                found.append(_read(name, module, reader.of(module), names))
            except NotLinear as reason:
                skipped.append(f"{name} ({reason})")
            except ValueError as error:
                raise ValueError(f"layer {name!r}, a {type(module).__name__}: {error}") from error.__cause__
    _refuse_shared(found)
    if not found:
        others = f" (adapters that are not linear layers: {checks.some(skipped)})" if skipped else ""
        raise ValueError(
            f"{type(model).__name__} has no adapted linear layer{others}; add adapters first, for example with "
            "peft.get_peft_model(model, LoraConfig(target_modules='all-linear'))"
        )
    if skipped:
        _warn_once(f"left alone, as their adapters are not linear layers: {checks.some(skipped)}")
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


def _adapter_modules(model: nn.Module) -> list[tuple[str, nn.Module, Reader]]:
    """The adapter layers by name, with their readers."""
    found: dict[str, tuple[nn.Module, Reader]] = {}
    parts: set[nn.Module] = set()
    for raw_name, module in model.named_modules():
        if module not in parts and (reader := reader_of(module)) is not None:
            parts.update(reader.parts(module))
            name = plain_name(raw_name)
            found[raw_name if name in found else name] = module, reader  # `module.fc` beside `fc`
    return [(name, *pair) for name, pair in found.items()]


def _read(name: str, module: nn.Module, reader: Reader, names: set[str]) -> LoRALayer:
    """The layer with those adapters that can be read; ValueError where they can't be trained at present."""
    base = reader.base(module)
    readable = frozenset(one for one in names if reader.adapters(module, one, base.shape))
    if not readable:
        raise NotLinear(f"{', '.join(sorted(names))}: of another kind")
    layer = LoRALayer(name, module, base, readable)
    if (fault := base.fault()) is not None:
        raise ValueError(fault)
    adapters = layer.all_adapters()
    on_meta = any(factor.is_meta for adapter in adapters for factor in (adapter.A, adapter.B))
    if on_meta and any(hasattr(part, "_hf_hook") for part in layer.module.modules()):
        raise ValueError(OFFLOADED)
    if base.kind == "8bit" and any(adapter.magnitude is not None for adapter in adapters):
        raise ValueError(
            "DoRA over a bitsandbytes 8-bit weight can't be trained: PEFT's own forward fails there from its second "
            "pass on. Use plain LoRA over it, or DoRA over a 4-bit or float weight"
        )
    return layer


def _refuse_shared(layers: list[LoRALayer]) -> None:
    """ValueError where both factors of an adapter are shared, so that neither's gradient is one layer's own."""
    adapters = [(layer.name, adapter) for layer in layers for adapter in layer.all_adapters() if adapter.trained]
    users: dict[int, list[str]] = {}
    for name, adapter in adapters:
        for param in adapter.params:
            users.setdefault(id(param), []).append(name)
    for name, adapter in adapters:
        both = [users[id(param)] for param in adapter.params]
        if all(len(names) > 1 for names in both):
            raise ValueError(
                f"layer {name!r} shares both factors of its adapter, A with {checks.some(both[0])} and B with "
                f"{checks.some(both[1])}, so that their gradients are sums over layers; share one of them, or use one "
                "module in all places"
            )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@functools.cache
def _peft_linear_forwards() -> frozenset[Any]:
    from peft.tuners.lora import bnb, layer

    kinds = [layer.Linear, getattr(bnb, "Linear4bit", None), getattr(bnb, "Linear8bitLt", None)]
    return frozenset(kind.forward for kind in kinds if kind is not None)


def fusable(layer: LoRALayer, base: BaseWeight, adapters: list[Adapter], x: Tensor) -> bool:
    """Whether the layer has `add_update`, or is PEFT's plain LoRA over a fusable base, without hooks."""
    module: Any = layer.module
    if not base.fusable(x):
        return False
    if hasattr(type(module), "add_update"):  # faster than asking the module
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
