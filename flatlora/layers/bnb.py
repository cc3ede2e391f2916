"""bitsandbytes' 4-bit and 8-bit weights, and the layout that 4-bit weights are trained in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .base import BaseWeight

__all__ = ["Bnb4bitBase", "Bnb8bitBase", "TrainingLayout", "hold_training_layout"]

_REPACKS = "support_avx512bf16_for_cpu"


def _loaded() -> Any:
    """`bitsandbytes.nn` if anyone has imported it, else None: without it there is no weight of its kind."""
    return sys.modules.get("bitsandbytes.nn")


class Bnb4bitBase(BaseWeight):
    """The weight of a `Linear4bit` (NF4, FP4), once it is quantised."""

    kind = "4bit"

    @staticmethod
    def reads(module: nn.Module, weight: Any) -> bool:
        bnb = _loaded()
        # issubclass, as isinstance of a parameter's class takes longer than all the rest.
        known = bnb is not None and issubclass(type(weight), bnb.Params4bit)
        return known and _quant_state(module, weight) is not None

    @property
    def plain(self) -> bool:
        return type(self.module).forward is _loaded().Linear4bit.forward

    def fault(self) -> str | None:
        if getattr(_quant_state(self.module, self.module.weight), "packing_format_for_cpu", False):
            return (
                "bitsandbytes has repacked its 4-bit weight for CPU inference, in a forward in eval mode, and it can't "
                "be trained any more; load the model again, and build the optimizer before the first evaluation"
            )
        return super().fault()

    @property
    def stored_dtype(self) -> torch.dtype | None:
        dtype: torch.dtype = _quant_state(self.module, self.module.weight).dtype
        return dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = self.module.weight
        return dequantize_4bit(weight.data, _quant_state(self.module, weight)).to(dtype)

    def write(self, weight: Tensor) -> None:
        self._check_shape(weight)
        old, state = self.module.weight, _quant_state(self.module, self.module.weight)
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(old, name) for name in names}
        new = weight.detach().to(old.device, state.dtype)
        quantised = _loaded().Params4bit(new, requires_grad=False, module=self.module, **settings)
        self.module.weight = quantised.to(old.device)  # quantises

    def apply_rows(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        from bitsandbytes import matmul_4bit

        if x.dtype == torch.bfloat16 and self.mixes:
            return torch.mm(self.dense(x.dtype)[:, columns], x.t(), out_dtype=torch.float32)
        # Not module(x): that would round x to the layer's compute dtype.
        weight = self.module.weight
        state = _quant_state(self.module, weight)
        return matmul_4bit(self._padded(x, columns), weight.data, quant_state=state).t()


def _quant_state(module: nn.Module, weight: Any) -> Any:
    """What a 4-bit weight is dequantised by. FSDP loses the weight's, and bitsandbytes falls back on the layer's."""
    state = getattr(weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


class Bnb8bitBase(BaseWeight):
    """The weight of a `Linear8bitLt`, once it is quantised: codes, and a scale for each row."""

    kind = "8bit"

    @staticmethod
    def reads(module: nn.Module, weight: Any) -> bool:
        if not isinstance(weight, Tensor) or weight.dtype != torch.int8:
            return False
        bnb = _loaded()
        return bnb is not None and isinstance(module, bnb.Linear8bitLt)

    @property
    def plain(self) -> bool:
        return type(self.module).forward is _loaded().Linear8bitLt.forward

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.module.weight.data.to(dtype).mul_(self._scale().to(dtype).unsqueeze(1))

    def write(self, weight: Tensor) -> None:
        self._check_shape(weight)
        old, state = self.module.weight, self.module.state
        quantised = _loaded().Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
        self.module.weight = quantised.to(old.device)  # quantises
        state.CB = state.SCB = None  # the old weight's; the next forward takes the new one's

    def apply_rows(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        return torch.cat([block[:, columns] @ x.t() for block in self._row_blocks(x.dtype)])

    def _row_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        codes, scale = self.module.weight.data, self._scale()
        for rows in self._row_slices():
            yield codes[rows].to(dtype) * scale[rows, None].to(dtype)

    def _scale(self) -> Tensor:
        # bitsandbytes moves the row scales from the weight to the layer's state on the first forward.
        state = self.module.state
        scale = state.SCB if getattr(state, "SCB", None) is not None else self.module.weight.SCB
        return scale.float() / 127


# --- the layout of 4-bit weights ----------------------------------------------------------------------------------


class _MayRepack:
    """What bitsandbytes reads as a layer's leave to repack its weight: true while no `TrainingLayout` holds it.

    It is the one place where holds are counted. It knows its holders weakly, so that one that is collected counts no
    more; and a copy, made by deepcopy or pickle, starts without any, until copies of the holders join.
    """

    def __init__(self) -> None:
        self.holders: WeakSet[TrainingLayout] = WeakSet()

    def __bool__(self) -> bool:
        return not self.holders

    def __reduce__(self) -> tuple[Any, ...]:
        return _MayRepack, ()


class TrainingLayout:
    """Keeps bitsandbytes from repacking the 4-bit weights of a model until it is released, or collected.

    A copy of it made together with the model, by deepcopy or pickle, holds the copied layers, independently of this
    one; a model that is copied alone is held by nobody.
    """

    def __init__(self, held: list[tuple[nn.Module, _MayRepack]]):
        self._held = held
        self._join()

    def _join(self) -> None:
        for _, leave in self._held:
            leave.holders.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": list(self._held)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._held = state["_held"]
        self._join()

    def release(self) -> None:
        """Lets go. Layers that nobody else holds may be repacked again, as before. Idempotent."""
        while self._held:
            module, leave = self._held.pop()
            leave.holders.discard(self)
            if leave and getattr(module, _REPACKS, None) is leave:
                setattr(module, _REPACKS, True)


def hold_training_layout(model: nn.Module) -> TrainingLayout:
    """Keeps bitsandbytes from repacking the 4-bit weights of `model` on the CPU while anyone holds them so.

    On a CPU with AVX512-BF16, the first forward in eval mode repacks a `Linear4bit` for inference and never undoes it:
    from then on the layer passes no gradient and its weight dequantises to something else. A model that is evaluated
    in between would train on silently broken.
    """
    held = []
    for module in model.modules():
        leave = getattr(module, _REPACKS, False)
        if not isinstance(leave, _MayRepack):
            if not leave:
                continue  # no 4-bit layer, or a CPU for which nothing is repacked
            leave = _MayRepack()
            setattr(module, _REPACKS, leave)
        held.append((module, leave))
    return TrainingLayout(held)
