"""What the parts of an iteration hand to each other and to the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .passes import LossPass, Values, norm_of

__all__ = ["BilevelStep", "Hypergradient", "LowerPoint", "TrainLoss", "ValLoss"]


@dataclass(frozen=True)
class BilevelStep:
    """What one iteration saw.

    Attributes:
        train_loss: L_tr(V, μ) of the last lower step, without γ·R.
        val_loss: L_val(V', μ) before the upper step; None where a call of `step()` did not reach the upper level.
        lower_grad_norm: ‖∇_V (L_tr + γ·R)‖ as the last lower step took it.
        upper_grad_norm: norm of the hypergradient; None as `val_loss`.
    """

    train_loss: float
    val_loss: float | None
    lower_grad_norm: float
    upper_grad_norm: float | None


@dataclass(frozen=True)
class TrainLoss:
    """L_tr as it was taken for a lower step: its passes, its value, and ∂_μ of it where that was not spared."""

    passes: list[LossPass]
    value: Tensor
    magnitude_grads: Values


@dataclass(frozen=True)
class LowerPoint:
    """Where a lower step begins: V, what perturbs the model, and L_tr as it was taken there."""

    V: Values
    perturbations: list[Any]
    loss: TrainLoss


@dataclass(frozen=True)
class ValLoss:
    """L_val, ``∂_μ L_val`` and ``v = ∇_V L_val``."""

    value: Tensor
    magnitude_grads: Values
    v: Values


@dataclass(frozen=True)
class Hypergradient:
    """Its two terms; a magnitude on which a loss does not depend is missing in the term of that loss."""

    first: Values
    second: Values

    def norms(self) -> dict[str, Tensor]:
        return {"first_order_norm": norm_of(self.first), "second_order_norm": norm_of(self.second)}

    def of(self, p: Tensor) -> Tensor:
        zero = torch.zeros_like(p)
        return self.first.get(p, zero) - self.second.get(p, zero)
