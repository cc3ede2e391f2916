"""ρ in a closed loop: it grows or shrinks until ε raises the loss as far as it was asked to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks

LARGEST, LEAST, FIRST = 0.3, 1e-4, 0.005  # ρ
_NEWEST, _PACE = 0.1, 0.1  # the newest step's share of the running mean; by how much ln ρ may change in a step


class Radius:
    """ρ that a step multiplies by ``exp(0.1·(1 − mean/rise))``, at most by 1.1 and at least by 0.9.

    Attributes:
        target: how far ε is to raise the loss, in its units.
        numbers: ρ, the running mean of the rise over about ten steps, and the steps that it is of. Of the mean over
            ranks, so that they are the same on all.
        next: these numbers once the step at hand is taken.
    """

    def __init__(self, target: float):
        self.target = target
        self.numbers = self.next = torch.tensor([FIRST, 0.0, 0.0], device="cpu")

    @property
    def rho(self) -> Tensor:
        return self.numbers[0]

    @torch.no_grad()
    def see(self, rise: Tensor | None, device: torch.device) -> None:
        """Looks at a step's rise; one that is None or not finite changes nothing. No wait for the device."""
        rise = _over_ranks(torch.full((), math.nan, device=device) if rise is None else rise.to(device, torch.float32))
        numbers = self.numbers.to(device)
        rho, mean, steps = numbers
        mean = mean.lerp(rise, (steps + 1).reciprocal().clamp(min=_NEWEST))
        pace = (_PACE * (1 - mean / self.target)).clamp(-_PACE, _PACE)
        new = torch.stack([(rho * pace.exp()).clamp(LEAST, LARGEST), mean, steps + 1])
        self.next = torch.where(rise.isfinite(), new, numbers)

    def advance(self) -> None:
        self.numbers = self.next

    def state(self) -> dict[str, Any]:
        return {"rise": self.target, "numbers": self.numbers.clone()}

    def load(self, state: dict[str, Any]) -> None:
        self.target, self.numbers = state["rise"], state["numbers"].clone()


def check_radius(state: Any) -> None:
    """ValueError unless `state` is what `Radius.state` gives."""
    checks.state_fields("radius", state, "rise", "numbers")
    checks.number("the state_dict's rise", state["rise"], above=0.0)
    numbers = state["numbers"]
    if not (isinstance(numbers, Tensor) and tuple(numbers.shape) == (3,) and numbers.isfinite().all()):
        raise ValueError(f"the state_dict's numbers of the radius must be a finite tensor (3,), got {numbers!r}")


def _over_ranks(rise: Tensor) -> Tensor:
    """The mean over all ranks, which must step alike."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rise
    mean = rise.clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()
