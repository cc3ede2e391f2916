"""Finding adapted linear layers in any model, and one view of them all.

A layer's effective weight is ``W' = diag(a)·W0 + Σ_k s_k·diag(c_k)·B_k·A_k`` over its active adapters: `a` and `c` are
one for LoRA, and hold DoRA's row factors ``μ / ‖W0 + s·B·A‖`` where an adapter has a magnitude.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from .adapter import Adapter
from .base import BaseWeight, linear_base
from .kinds import (
    _gralora_adapters,
    _is_gralora,
    _is_peft,
    _is_peft_gralora,
    _is_plain,
    _peft_base,
    _plain_adapter,
    _plain_base,
)

__all__ = ["LoRALayer", "lora_layers", "plain_name"]

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
        base: its frozen weight.
        shape: (m, n) = (out_features, in_features).
        names: the adapters that this view was asked for; `adapters()` yields all active ones.
        is_peft: whether the module is PEFT's.
    """

    def __init__(self, name: str, module: nn.Module, base: BaseWeight, names: frozenset[str]):
        self.name = name
        self.module: Any = module
        self.base = base
        self.names = names
        # A module's kind does not change, and asking it takes longer than the rest of `adapters()`.
        self._gralora = _is_gralora(module)
        self.is_peft = _is_peft(module) or _is_peft_gralora(module)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are folded into the base weight at present."""
        if self.is_peft:
            return tuple(self.module.merged_adapters)
        return ("default",) if getattr(self.module, "merged", False) else ()

    @property
    def active(self) -> bool:
        """Whether one of the adapters asked for takes part in the layer's output at present."""
        if not self.is_peft:
            return True
        if self.module.disable_adapters:
            return False
        return any(name in self.names for name in (*self.module.active_adapters, *self.merged))

    def all_adapters(self) -> list[Adapter]:
        """Every adapter asked for, active or not."""
        return [adapter for name in sorted(self.names) for adapter in self._adapters(name)]

    def adapters(self) -> list[Adapter]:
        """The adapters that the layer adds to its base weight at present; none while they are merged or disabled."""
        if self.merged or (self.is_peft and self.module.disable_adapters):
            return []
        names = self.module.active_adapters if self.is_peft else ["default"]
        return [adapter for name in names for adapter in self._adapters(name)]

    def _adapters(self, name: str) -> list[Adapter]:
        module: Any = self.module
        if self._gralora:
            return _gralora_adapters(module, name)
        if not self.is_peft:
            return [_plain_adapter(module, self.shape)]
        factors, magnitudes = module.lora_A, module.lora_magnitude_vector
        if name not in factors:
            return []
        magnitude = magnitudes[name].weight if name in magnitudes else None
        A, B = factors[name].weight, module.lora_B[name].weight
        return [Adapter(name, A, B, module.scaling[name], magnitude, module.lora_dropout[name], A, B)]

    def __repr__(self) -> str:
        m, n = self.shape
        return f"LoRALayer({self.name!r}, {n} -> {m}, {self.base.kind} base, adapters {sorted(self.names)})"


def lora_layers(model: nn.Module, adapter: str | Iterable[str] | None = None) -> list[LoRALayer]:
    """Finds every adapted linear layer of a model.

    Understood are PEFT's LoRA, rsLoRA and DoRA layers over `nn.Linear`, `Conv1D` and bitsandbytes' `Linear4bit` and
    `Linear8bitLt`, GraLoRA layers, this library's and PEFT's, and any other module that holds `lora_A` and `lora_B`
    (2-D parameters or `nn.Linear` modules) beside a linear base: its own `weight`, or a child named `base_layer`,
    `linear`, `base` or `original`. Such a module must say its scaling, as `scaling` or as `alpha` (`lora_alpha`) and
    `r` (`rank`).

    Adapters of other kinds (embeddings, convolutions, experts, token-dependent variants) are not linear layers with
    one weight update; they are left out and named once in a log line.

    Args:
        model: any module, also one wrapped by DDP, FSDP or `torch.compile`.
        adapter: name or names of the adapters to look at; None for all.

    Raises:
        ValueError: no adapted linear layer, an adapter name the model does not have, a module without a scaling.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = None if adapter is None else {adapter} if isinstance(adapter, str) else set(adapter)
    found: list[LoRALayer] = []
    skipped: list[str] = []
    known: set[str] = set()
    for raw_name, module in model.named_modules():
        name = plain_name(raw_name)
        if _is_peft(module):
            available = {*module.lora_A, *module.lora_embedding_A}
            base = _peft_base(module)
        elif _is_gralora(module):
            available = set(module.gralora_A) if _is_peft_gralora(module) else {"default"}
            base = linear_base(module.base_layer)
        elif _is_plain(module):
            available, base = {"default"}, _plain_base(module)
        else:
            continue
        known |= available
        names = available if wanted is None else available & wanted
        if not names:
            continue
        if base is None:
            skipped.append(name)
            continue
        if getattr(getattr(base.module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"layer {name!r}: bitsandbytes has repacked its 4-bit weight for CPU inference, in a forward in eval "
                "mode, and it can't be trained any more; load the model again, and build the optimizer before the "
                "first evaluation"
            )
        layer = LoRALayer(name, module, base, frozenset(names))
        layer.all_adapters()  # fails here, not in the first step, where a plain layer's form is not understood
        found.append(layer)
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


@functools.cache
def _tell_once(message: str) -> None:
    logger.warning(message)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
