"""bitsandbytes' 4-bit and 8-bit weights, and the layout that 4-bit weights are trained in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .base import BaseWeight


def _loaded() -> Any:
    """`bitsandbytes.nn` if it has been imported, else None: then no layer is of its kind."""
    return sys.modules.get("bitsandbytes.nn")


class Bnb4bitBase(BaseWeight):
    """The quantised weight of a `Linear4bit` (NF4, FP4)."""

    kind = "4bit"

    @staticmethod
    def reads(module: nn.Module, weight: Any) -> bool:
        bnb = _loaded()
        # issubclass, as isinstance is slow with the metaclass of parameters.
        known = bnb is not None and issubclass(type(weight), bnb.Params4bit)
        return known and _quant_state(module, weight) is not None

    @property
    def plain(self) -> bool:
        return type(self.module).forward is _loaded().Linear4bit.forward

    def fault(self) -> str | None:
        if getattr(self._state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes has repacked its 4-bit weight for CPU inference, in a forward in eval mode, and it can't "
                "be trained any more; load the model again, and build the optimizer before the first evaluation"
            )
        return super().fault()

    @property
    def stored_dtype(self) -> torch.dtype | None:
        return self._state.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.module.weight.data, self._state).to(dtype)

    def _store(self, weight: Tensor) -> None:
        old = self.module.weight
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(old, name) for name in names}
        new = weight.to(old.device, self._state.dtype)
        quantised = _loaded().Params4bit(new, requires_grad=False, module=self.module, **settings)
        self.module.weight = quantised.to(old.device)  # quantises

    def apply_rows(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        from bitsandbytes import matmul_4bit

        if x.dtype == torch.bfloat16 and self.mixes:
            return torch.mm(self.dense(x.dtype)[:, columns], x.t(), out_dtype=torch.float32)
        # Not module(x): that would round x to the layer's compute dtype.
        return matmul_4bit(self._padded(x, columns), self.module.weight.data, quant_state=self._state).t()

    @property
    def _state(self) -> Any:
        return _quant_state(self.module, self.module.weight)


def _quant_state(module: nn.Module, weight: Any) -> Any:
    """The weight's quant_state, or the layer's, which bitsandbytes falls back on where FSDP has lost the weight's."""
    state = getattr(weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


class Bnb8bitBase(BaseWeight):
    """The quantised weight of a `Linear8bitLt`: int8 codes, and a scale for each row."""

    kind = "8bit"

    @staticmethod
    def reads(module: nn.Module, weight: Any) -> bool:
        is_int8 = isinstance(weight, Tensor) and weight.dtype == torch.int8
        return is_int8 and (bnb := _loaded()) is not None and isinstance(module, bnb.Linear8bitLt)

    @property
    def plain(self) -> bool:
        return type(self.module).forward is _loaded().Linear8bitLt.forward

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.module.weight.data.to(dtype).mul_(self._scale().to(dtype).unsqueeze(1))

    def _store(self, weight: Tensor) -> None:
        old, state = self.module.weight, self.module.state
        quantised = _loaded().Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        self.module.weight = quantised.to(old.device)  # quantises
        state.CB = state.SCB = None  # the old weight's; the next forward sets them

    def _row_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        codes, scale = self.module.weight.data, self._scale()
        for rows in self._row_slices():
            yield codes[rows].to(dtype) * scale[rows, None].to(dtype)

    def _scale(self) -> Tensor:
        # The first forward moves the row scales from the weight to the layer's state.
        state = self.module.state
        scale = state.SCB if getattr(state, "SCB", None) is not None else self.module.weight.SCB
        return scale.float() / 127


_REPACKS = "support_avx512bf16_for_cpu"  # the attribute by which bitsandbytes decides


class _MayRepack:
    """Takes the place of a layer's flag for repacking, and is false while a `TrainingLayout` holds the layer.

    It refers to its holders weakly, so that a collected one no longer counts. A copy (deepcopy, pickle) has no holders
    until copied ones join it.
    """

    def __init__(self) -> None:
        self.holders: WeakSet[TrainingLayout] = WeakSet()

    def __bool__(self) -> bool:
        return not self.holders

    def __reduce__(self) -> tuple[Any, ...]:
        return _MayRepack, ()


class TrainingLayout:
    """Keeps bitsandbytes from repacking a model's 4-bit weights until it is released or collected.

    Copied together with the model (deepcopy, pickle), it holds the copied layers; a model copied alone is not held.
    """

    def __init__(self, held: list[tuple[nn.Module, _MayRepack]]):
        self._held = held
        for _, flag in held:
            flag.holders.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingLayout, (list(self._held),)

    def release(self) -> None:
        """Lets the layers be repacked again, unless others hold them. Idempotent."""
        while self._held:
            module, flag = self._held.pop()
            flag.holders.discard(self)
            if flag and getattr(module, _REPACKS, None) is flag:
                setattr(module, _REPACKS, True)


def hold_training_layout(model: nn.Module) -> TrainingLayout:
    """Keeps bitsandbytes from repacking the 4-bit weights of `model` on a CPU.

    On a CPU with AVX512-BF16, the first forward in eval mode repacks a `Linear4bit` for inference and never undoes it:
    the layer then passes no gradient and its weight dequantises to something else. A model that is evaluated during
    training would go on broken without an error.
    """
    held = []
    for module in model.modules():
        flag = getattr(module, _REPACKS, False)
        if not isinstance(flag, _MayRepack):
            if not flag:
                continue  # no 4-bit layer, or a CPU for which nothing is repacked
            flag = _MayRepack()
            setattr(module, _REPACKS, flag)
        held.append((module, flag))
    return TrainingLayout(held)
