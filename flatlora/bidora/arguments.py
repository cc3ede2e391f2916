"""What a `BilevelOptimizer` refuses to be built from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .. import checks
from .parameters import direction_parameters, is_peft, magnitude_parameters

__all__ = ["check_levels", "check_options", "warn_of_shared_data"]


def check_levels(lower: Optimizer, upper: Optimizer, model: nn.Module, adapter: str | Iterable[str] | None) -> None:
    """ValueError unless the levels are apart, of this model and, if it has PEFT's layers, not mixed up."""
    low, up = ({id(p) for group in level.param_groups for p in group["params"]} for level in (lower, upper))
    built = "build lower from direction_parameters(model) and upper from magnitude_parameters(model)"
    if is_peft(model):
        directions = {id(p) for p in direction_parameters(model, adapter)}
        magnitudes = {id(p) for p in magnitude_parameters(model, adapter)}
    else:
        directions, magnitudes = low, up
    if low & up:
        raise ValueError(f"lower and upper overlap: they share {len(low & up)} parameters; {built}")
    foreign = (low | up) - {id(p) for p in model.parameters()}
    if foreign:
        raise ValueError(
            f"{len(foreign)} parameters of lower and upper are not in the model; build the optimizers from this model, "
            "after its adapters were added"
        )
    if low & magnitudes and up & directions:
        raise ValueError(f"lower and upper are swapped: lower holds magnitudes and upper directions; {built}")
    if low & magnitudes:
        raise ValueError(f"lower holds {len(low & magnitudes)} magnitudes, which belong to upper; {built}")
    if up - magnitudes:
        raise ValueError(f"upper holds {len(up - magnitudes)} parameters that are not magnitudes; {built}")


def check_options(loss_fn: Any, xi: Any, unroll_steps: Any, difference: Any, epsilon: Any, orthogonality: Any) -> None:
    """ValueError for a bad number or word, TypeError for a `loss_fn` that can't be called."""
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(model, batch), got {loss_fn!r}")
    if isinstance(xi, str) and xi != "lr":
        raise ValueError(f"xi must be a number >= 0 or 'lr', got {xi!r}")
    if not isinstance(xi, str):
        checks.number("xi", xi)
    checks.integer("unroll_steps", unroll_steps, 1)
    checks.option("difference", difference, ("central", "forward"))
    checks.number("epsilon", epsilon, above=0)  # to leave the second-order term out, one sets xi=0
    checks.number("orthogonality", orthogonality)


def warn_of_shared_data(train_dataloader: Any, val_dataloader: Any) -> None:
    """Warns the caller of the caller if the two are one object."""
    if train_dataloader is val_dataloader is not None:
        warnings.warn(
            "the same object is both train_dataloader and val_dataloader, so magnitudes are trained on the data of "
            "the directions; split the data, for example with flatlora.split_dataset",
            stacklevel=3,
        )
