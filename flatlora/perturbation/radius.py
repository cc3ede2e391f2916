"""ρ in a closed loop: it grows or shrinks until ε raises the loss as far as it was asked to."""

from __future__ import annotations

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
        rho: ρ of the next step; of the mean over ranks, so that it is the same on all.
        mean: the running mean of the rise, over about ten steps.
        steps: that were looked at.
    """

    def __init__(self, target: float):
        self.target, self.steps = target, 0
        self.rho, self.mean = torch.tensor(FIRST, device="cpu"), torch.zeros((), device="cpu")

    @torch.no_grad()
    def see(self, rise: Tensor) -> None:
        """Takes in a step's rise; one that is not finite leaves ρ as it is. No wait for the device."""
        rise, self.steps = _over_ranks(rise.float()), self.steps + 1
        rho, mean = self.rho.to(rise), self.mean.to(rise)
        usable = rise.isfinite()
        self.mean = torch.where(usable, mean.lerp(rise, max(_NEWEST, 1 / self.steps)), mean)
        pace = (_PACE * (1 - self.mean / self.target)).clamp(min=-_PACE)
        self.rho = torch.where(usable, (rho * pace.exp()).clamp(LEAST, LARGEST), rho)

    def state(self) -> dict[str, Any]:
        return {"rise": self.target, "rho": self.rho.clone(), "mean": self.mean.clone(), "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.steps, self.rho, self.mean = state["steps"], state["rho"].clone(), state["mean"].clone()


def check_radius(state: Any) -> None:
    """ValueError unless `state` is what `Radius.state` gives."""
    checks.state_fields("radius", state, "rise", "rho", "mean", "steps")
    checks.number("the state_dict's rise", state["rise"], above=0.0)
    checks.integer("the state_dict's steps", state["steps"], 0)
    for name in ("rho", "mean"):
        if not (isinstance(state[name], Tensor) and state[name].dim() == 0 and state[name].isfinite()):
            raise ValueError(f"the state_dict's {name} must be a finite tensor without dimensions, got {state[name]!r}")


def _over_ranks(rise: Tensor) -> Tensor:
    """The mean over all ranks, which must step alike."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rise
    mean = rise.clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()
