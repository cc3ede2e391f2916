"""What the wrappers around an optimizer add to the model: noted, held, lifted, whatever method each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.optim import Optimizer

from ..wrapper import OptimizerWrapper, chain

__all__ = ["current_perturbations", "perturbed_as", "unperturbed"]


def current_perturbations(optimizer: Optimizer) -> list[Any]:
    """What each wrapper around the base optimizer adds at present, outermost first."""
    return [wrapper.current_perturbation() for wrapper in chain(optimizer)]


@contextmanager
def perturbed_as(optimizer: Optimizer, perturbations: list[Any]) -> Iterator[None]:
    """Within the context the model is perturbed as it was when `current_perturbations` gave these."""
    with ExitStack() as stack:
        for wrapper, perturbation in zip(chain(optimizer), perturbations, strict=True):
            stack.enter_context(wrapper.perturbed_as(perturbation))
        yield


@contextmanager
def unperturbed(wrappers: Iterable[OptimizerWrapper]) -> Iterator[None]:
    """Within the context these wrappers leave the model alone."""
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(wrapper.unperturbed())
        yield
