"""How far a perturbation raises the loss: ``⟨G, ε⟩`` over all layers, which products with ε give away for nothing."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..layers.base import sum_dtype

MEMORY = 0.98  # what a step keeps of the running mean's weight: fifty steps
_SCALER_STEP: Any = torch.amp.GradScaler.step.__code__


class LossRise:
    """To first order, what ε adds to the loss of a step, at the perturbed point and in the units of that loss.

    G is the gradient of a layer's weight. A layer's low-rank term computes ``h = s·x·Aᵀ`` in forward and
    ``g = (∂L/∂out)·B`` in backward; then ``⟨G, s·B·A⟩ = Σ h∘g``, the trace of ``hᵀ·g``. `AddedTerms.record` hands
    `record` one such small matrix for each layer, summed over micro-batches, and a step adds up their diagonals: one
    launch more for a layer, before clipping, and no wait for the device.
    """

    def __init__(self) -> None:
        # Of the last step and this rank alone: a step that asks the others would wait for ranks without more data.
        self.value = torch.zeros((), dtype=torch.float32, device="cpu")
        self.samples = 0  # steps that the running mean is of
        self._parts: dict[Any, Tensor] = {}
        # Sums over steps, newer ones of more weight: of the weights, of their squares, of the rise, of its square.
        self._sums = torch.zeros(4, dtype=torch.float32, device="cpu")
        self._new = False  # whether `value` is not in the mean yet

    def record(self, layer: str, part: Tensor) -> None:
        """Takes a backward pass's part of a layer: square matrices, of whose traces ``⟨G, ε⟩`` is the sum."""
        key = layer, part.shape
        if (former := self._parts.get(key)) is not None:
            # In float32 at least: sums of many micro-batches would stop growing in half precision.
            part = former.to(torch.promote_types(part.dtype, torch.float32)) + part
        self._parts[key] = part

    @property
    def newest(self) -> Tensor | None:
        """`value`, unless no backward pass of the step recorded any."""
        return self.value if self._new else None

    def forget(self) -> None:
        """Drops what backward passes have recorded since the last step."""
        self._parts.clear()

    @torch.no_grad()
    def read(self, factor: float = 1.0) -> None:
        """Adds up what backward passes have recorded since the last step, times `factor`."""
        alike: dict[Any, list[Tensor]] = {}
        for part in self._parts.values():
            alike.setdefault((part.device, part.dtype, part.shape), []).append(part)
        self._parts = {}
        # Three launches, whatever the number of layers.
        sums = [
            torch.stack(same).diagonal(dim1=-2, dim2=-1).sum(dtype=sum_dtype(device))
            for (device, *_), same in alike.items()
        ]
        total = sum((one.to(sums[0].device) for one in sums[1:]), sums[0]) if sums else torch.zeros_like(self.value)
        if (scale := _loss_scale()) is not None:
            total = total / scale.to(total.device)
        self.value, self._new = total * factor, bool(sums)

    @torch.no_grad()
    def advance(self) -> None:
        """Takes the last value into the running mean, unless it is not finite, as when a scaled loss overflowed."""
        if not self._new:
            return
        v = self.value
        # Nothing is brought to the device where there is nothing yet.
        former = self._sums.to(v.device, v.dtype) if self.samples else torch.zeros(4, dtype=v.dtype, device=v.device)
        one = torch.ones_like(v)
        new = torch.stack([one, one, v, v.square()]) + former * MEMORY
        new[1] -= former[1] * (MEMORY - MEMORY**2)
        self._sums = torch.where(v.isfinite(), new, former)
        self.samples, self._new = self.samples + 1, False

    def mean(self) -> tuple[Tensor, Tensor]:
        """The running mean over about fifty steps, and its standard error; on the device, 0 where there is none yet."""
        weight, squares, total, total_sq = self._sums
        mean = total / weight
        independent = weight.square() / squares  # as many steps of equal weight
        variance = (total_sq / weight - mean.square()).clamp(min=0.0) / (independent - 1)
        return mean.nan_to_num(0.0), variance.sqrt().nan_to_num(0.0, posinf=0.0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}

    def snapshot(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": dict(self._parts)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        self.__dict__.update(snapshot, _parts=dict(snapshot["_parts"]))

    def state(self) -> dict[str, Any]:
        return {"samples": self.samples, "sums": self._sums.clone()}

    def load(self, method_state: dict[str, Any] | None) -> None:
        """Takes over what a method's state has of `state`, or starts afresh."""
        found = (method_state or {}).get("rise") or LossRise().state()
        self.samples, self._sums, self._new = found["samples"], found["sums"].clone(), False
        self.forget()


def check_rise(method_state: dict[str, Any]) -> None:
    """ValueError unless a method's state has of a rise what `LossRise.state` gives, or nothing."""
    if (found := method_state.get("rise")) is not None:
        checks.state_fields("loss rise", found, "samples", "sums")
        checks.integer("the state_dict's samples", found["samples"], 0)
        if not (isinstance(found["sums"], Tensor) and tuple(found["sums"].shape) == (4,)):
            raise ValueError(f"the state_dict's sums of the loss rise must be a tensor (4,), got {found['sums']!r}")


def _loss_scale() -> Tensor | None:
    """What a GradScaler has multiplied the loss by, if one calls `step()` now; optimizers can't ask it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _SCALER_STEP:
            return getattr(frame.f_locals.get("self"), "_scale", None)  # which one that is switched off has not
        frame = frame.f_back
    return None
