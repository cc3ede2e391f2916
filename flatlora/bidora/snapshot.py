"""What a step may change, noted before it, so that a step that fails can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..streams import RandomStreams
from ..wrapper import chain
from .data import Batches
from .loop import LoopWatch
from .passes import assign, devices_of, parameters_of, running_statistics

__all__ = ["undone_on_error"]


@contextmanager
def undone_on_error(
    model: nn.Module, optimizers: Iterable[Optimizer], batches: Iterable[Batches | None], watch: LoopWatch | None = None
) -> Iterator[None]:
    """If the context ends in an exception, everything is as it was before, and the exception goes on.

    That is the parameters that the optimizers hold, their `state` and groups and what their wrappers keep, the
    gradients and running statistics of the model, the random streams, the positions in the data, and what `watch` has
    seen. What a base optimizer keeps elsewhere cannot be known and stays as it has become.
    """
    optimizers, positions = list(optimizers), [(one, one.position) for one in batches if one is not None]
    values = {p: p.detach().clone() for optimizer in optimizers for p in parameters_of(optimizer)}
    grads = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters() if p.requires_grad]
    statistics, streams = running_statistics(model), RandomStreams(devices_of(model))
    states = [_OptimizerState(optimizer) for optimizer in optimizers]
    seen = None if watch is None else watch.seen()
    try:
        yield
    except BaseException:
        assign(values)
        assign(statistics)
        for p, grad in grads:
            p.grad = grad
        for state in states:
            state.restore()
        for one, position in positions:
            one.go_back(position)
        if watch is not None and seen is not None:
            watch.go_back(seen)
        streams.restore()
        raise


class _OptimizerState:
    """A copy of an optimizer's state, groups and methods."""

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        # Not state_dict() and load_state_dict(), which round moments to the parameters' type.
        self._state = _copied(dict(optimizer.state))
        self._groups = [_copied(_but_params(group)) for group in optimizer.param_groups]
        self._methods = [(wrapper, _copied(wrapper.method_state())) for wrapper in chain(optimizer)]

    def restore(self) -> None:
        _put_back(self._optimizer.state, self._state)
        for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put_back(group, {**kept, "params": group["params"]})
        for wrapper, kept in self._methods:
            if kept:
                wrapper.load_method_state(kept)


def _but_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copied(value: Any) -> Any:
    """A copy down to the tensors; other objects than these, dicts, lists and tuples are taken to be immutable."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


@torch.no_grad()
def _put_back(present: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Makes `present` equal to `kept`; in place where it can be, as tensors may be shared or captured in a graph."""
    for key in [key for key in present if key not in kept]:
        del present[key]
    for key, value in kept.items():
        now = present.get(key)
        if isinstance(now, dict) and isinstance(value, dict):
            _put_back(now, value)
        elif isinstance(now, Tensor) and isinstance(value, Tensor) and _alike(now, value):
            now.copy_(value)
        else:
            present[key] = value


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
