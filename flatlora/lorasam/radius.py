"""ρ in a closed loop: it grows or shrinks until ε raises the loss as far as it was asked to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..ranks import mean_over_ranks

LARGEST, LEAST, FIRST = 0.3, 1e-4, 0.005  # ρ
_NEWEST, _PACE = 0.1, 0.1  # the newest step's share of the running mean; by how much ln ρ may change in a step
_MOST = 100  # times the target: a single step counts as no more


class Radius:
    """ρ that a step multiplies by ``exp(0.1·(1 − mean/rise))``, at most by 1.1 and at least by 0.9.

    Attributes:
        target: how far ε is to raise the loss, in its units.
        numbers: ρ, the running mean of the rise over all ranks and about ten steps, and the number of steps in it.
        next: these numbers once the step at hand is taken.
    """

    def __init__(self, target: float):
        self.target = target
        self.start()

    def start(self) -> None:
        self.numbers = self.next = self._seen = torch.tensor([FIRST, 0.0, 0.0], device="cpu")

    @property
    def rho(self) -> Tensor:
        return self.numbers[0]

    @torch.no_grad()
    def see(self, rise: Tensor | None, device: torch.device) -> None:
        """Looks at a step's rise; one that is None or not finite changes nothing. No wait for the device."""
        rise = torch.full((), math.nan, device=device) if rise is None else rise.to(device, torch.float32)
        rise = mean_over_ranks(rise)
        self.next = self.numbers.to(device)
        rho, mean, steps = self.next
        bounded = rise.clamp(-_MOST * self.target, _MOST * self.target)
        mean = mean.lerp(bounded, (steps + 1).reciprocal().clamp(min=_NEWEST))
        pace = (_PACE * (1 - mean / self.target)).clamp(-_PACE, _PACE)
        new = torch.stack([(rho * pace.exp()).clamp(LEAST, LARGEST), mean, steps + 1])
        self._seen = torch.where(rise.isfinite(), new, self.next)

    def go_on(self, usable: Tensor) -> Tensor:
        """ρ of the next step: as the rise asks for, if the gradients are usable; else, as ε stays, ρ does too."""
        self.next = torch.where(usable.to(self._seen.device), self._seen, self.next)
        return self.next[0]

    def advance(self) -> None:
        self.numbers = self.next

    def state(self) -> dict[str, Any]:
        return {"rise": self.target, "numbers": self.numbers.clone()}

    def load(self, state: dict[str, Any]) -> None:
        self.numbers = self.next = self._seen = state["numbers"].clone()


def check_radius(state: Any) -> None:
    """ValueError unless `state` is what `Radius.state` gives."""
    checks.state_fields("radius", state, "rise", "numbers")
    checks.number("the state_dict's rise", state["rise"], above=0.0)
    numbers = state["numbers"]
    right = isinstance(numbers, Tensor) and numbers.dtype == torch.float32 and tuple(numbers.shape) == (3,)
    if not (right and numbers.isfinite().all() and LEAST <= numbers[0] <= LARGEST and numbers[2] >= 0):
        raise ValueError(
            f"the state_dict's numbers of the radius must be float32: ρ from {LEAST:g} to {LARGEST:g}, the mean and "
            f"the steps, got {numbers!r}"
        )
