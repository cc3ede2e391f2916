"""Forward-backward passes that leave no trace, over all ranks, and parameters that are elsewhere for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..streams import RandomStreams, private_streams
from ..wrapper import chain
from .data import to_device

Values = dict[Tensor, Tensor]  # of parameters, or their gradients

__all__ = [
    "LossPass",
    "Values",
    "assign",
    "average_gradients",
    "batch_pass",
    "begin_alike",
    "devices_of",
    "finite",
    "frozen",
    "grads_of",
    "isolated",
    "model_loss",
    "moved",
    "norm_of",
    "parameters_of",
    "running_statistics",
    "together",
    "undone_on_error",
    "whole_model",
]


@dataclass
class LossPass:
    """A forward pass that can be run again: what gives its loss, and where the random streams stood.

    `weight` is the derivative by this loss: None for one, or what a loop made of it, as when it accumulates gradients.
    """

    loss: Callable[[], Tensor]
    streams: RandomStreams
    weight: Tensor | None = None

    def backward(self) -> Tensor:
        """Runs it, adds to the gradients, and returns its part of the whole loss."""
        self.streams.restore()
        with torch.enable_grad():
            loss = self.loss()
            loss.backward(self.weight)
        return self.part(loss)

    def part(self, loss: Tensor) -> Tensor:
        loss = loss.detach().reshape(())
        return loss if self.weight is None else loss * self.weight.reshape(())


def model_loss(output: Any) -> Tensor | None:
    """The loss in what a model returned, if it has one."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def batch_pass(
    model: nn.Module,
    batch: Any,
    which: str,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
) -> LossPass:
    """``loss_fn(model, batch)``, or ``model(**batch).loss``, from where the random streams stand now.

    The batch goes to the model's first device. `which` batch it is, errors tell.
    """
    devices = devices_of(model)
    batch = to_device(batch, devices[0])
    return LossPass(lambda: _batch_loss(model, batch, which, loss_fn), RandomStreams(devices))


def _batch_loss(model: nn.Module, batch: Any, which: str, loss_fn: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    """ValueError if it is not a scalar to go backward from."""
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)
    elif isinstance(batch, Mapping):
        loss = model_loss(model(**batch))
    else:
        raise ValueError(f"a {which} batch is a {type(batch).__name__}, not a mapping; pass loss_fn(model, batch)")
    if loss is None:
        keys = f" (it has {', '.join(map(str, batch))})" if isinstance(batch, Mapping) else ""
        raise ValueError(f"no loss for a {which} batch{keys}; does it lack labels? Add them, or pass a loss_fn")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"the loss of a {which} batch must be a scalar tensor, got {found}; return its mean")
    if not loss.requires_grad:
        raise ValueError(f"the loss of a {which} batch does not depend on any parameter that requires a gradient")
    return loss


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices of a model's parameters; the first is where batches go."""
    return list(dict.fromkeys(p.device for p in model.parameters()))


def finite(which: str, loss: Tensor, *others: Tensor) -> list[float]:
    """The numbers on the host, fetched at once; ValueError unless they are finite."""
    values = torch.stack([value.reshape(()).to(loss) for value in (loss, *others)]).tolist()
    if not all(map(math.isfinite, values)):
        what = f"{which} loss is {values[0]}" if not math.isfinite(values[0]) else f"{which} gradient is not finite"
        raise ValueError(f"the {what}; parameters are left as they were. Look at the batch, or lower the learning rate")
    return values


# --- parameters and their gradients -------------------------------------------------------------------------------


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that the optimizer holds, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def grads_of(params: Iterable[Tensor]) -> Values:
    """The gradients there are, by parameter."""
    return {p: p.grad for p in params if p.grad is not None}


def norm_of(values: Values) -> Tensor:
    """The norm of all values together."""
    norms = [value.norm() for value in values.values()]
    if not norms:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    return torch.stack([norm.to(norms[0]) for norm in norms]).norm()


@torch.no_grad()
def assign(values: Values) -> None:
    """Writes the values into their parameters."""
    for p, value in values.items():
        p.copy_(value)


@contextmanager
def moved(values: Values) -> Iterator[None]:
    """Within the context the parameters have these values; afterwards the very bits they had."""
    present = {p: p.detach().clone() for p in values}
    try:
        assign(values)
        yield
    finally:
        assign(present)


@contextmanager
def frozen(params: Iterable[Tensor]) -> Iterator[None]:
    """Spares backward the gradients of `params`."""
    trained = [p for p in params if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def running_statistics(model: nn.Module) -> Values:
    """The buffers that forward passes in train mode update, as BatchNorm's, and their values."""
    running = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    return {buffer: buffer.clone() for module in running for buffer in module.buffers(recurse=False)}


@contextmanager
def isolated(model: nn.Module, seed: int = 0, watch: Any = None) -> Iterator[None]:
    """Puts gradients, random streams and running statistics back afterwards; within, the streams start at `seed`.

    Nor does `watch`, a `LoopWatch` if one is given, see what is done within.
    """
    grads = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    statistics = running_statistics(model)
    try:
        for p, _ in grads:
            p.grad = None  # backward would add to it in place
        with private_streams(seed, devices_of(model)), nullcontext() if watch is None else watch.away():
            yield
    finally:
        assign(statistics)
        for p, grad in grads:
            p.grad = grad


@contextmanager
def together(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enters all of them, the first first."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def undone_on_error(
    model: nn.Module, optimizers: Iterable[Optimizer], batches: Iterable[Any], watch: Any = None
) -> Iterator[None]:
    """If the context ends in an exception, everything is as it was before, and the exception goes on.

    That is the parameters that the optimizers hold, their `state` and groups and what their wrappers keep, the
    gradients and running statistics of the model, the random streams, the positions in `batches` (`Batches` or None),
    and what `watch` has seen. What a base optimizer keeps elsewhere cannot be known and stays as it has become. All
    that is copied beforehand: four times the trained parameters under Adam, and about 1 % of a step's time.
    """
    optimizers, positions = list(optimizers), [(one, one.position) for one in batches if one is not None]
    values = {p: p.detach().clone() for optimizer in optimizers for p in parameters_of(optimizer)}
    grads = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters() if p.requires_grad]
    statistics, streams = running_statistics(model), RandomStreams(devices_of(model))
    restores = [_noted(optimizer) for optimizer in optimizers]
    seen = None if watch is None else watch.seen()
    try:
        yield
    except BaseException:
        assign(values)
        assign(statistics)
        for p, grad in grads:
            p.grad = grad
        for restore in restores:
            restore()
        for one, position in positions:
            one.go_back(position)
        if watch is not None:
            watch.go_back(seen)
        streams.restore()
        raise


def _noted(optimizer: Optimizer) -> Callable[[], None]:
    """What puts back the state, groups and methods that an optimizer has now."""
    # Not state_dict() and load_state_dict(), which round moments to the parameters' type.
    state = _copied(dict(optimizer.state))
    groups = [
        _copied({key: value for key, value in group.items() if key != "params"}) for group in optimizer.param_groups
    ]
    methods = [(wrapper, _copied(wrapper.method_state())) for wrapper in chain(optimizer)]

    def restore() -> None:
        _put_back(optimizer.state, state)
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            _put_back(group, {**kept, "params": group["params"]})
        for wrapper, kept in methods:
            if kept:
                wrapper.load_method_state(kept)

    return restore


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


# --- several processes, each with its share of every batch --------------------------------------------------------


def whole_model(model: nn.Module) -> nn.Module:
    """The model, or what DistributedDataParallel has wrapped: it reduces no pass that spares some parameters.

    Raises:
        RuntimeError: a trained parameter is sharded.
    """
    if sharded := [name for name, p in model.named_parameters() if p.requires_grad and hasattr(p, "full_tensor")]:
        raise RuntimeError(
            f"BilevelOptimizer can't train a sharded model: {len(sharded)} parameters (first: {sharded[0]!r}) are "
            "DTensors, as fully_shard makes them. Leave the model whole, or wrap it in DistributedDataParallel"
        )
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@torch.no_grad()
def begin_alike(params: Iterable[Tensor]) -> None:
    """Gives every rank rank 0's values, as DistributedDataParallel does with its model."""
    for p in params if _ranks() > 1 else ():
        dist.broadcast(p.detach(), 0)


@torch.no_grad()
def average_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Makes the model's gradients their means over the ranks, by one reduction, and returns the mean of the losses.

    A gradient that only some ranks have is zero on the others. The same parameters must be trained on all.
    """
    if (ranks := _ranks()) == 1:
        return loss
    params = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    there = torch.tensor([p.grad is not None for p in params])
    flat = torch.cat([part.flatten().to(loss.device) for part in (loss, there, *parts)])
    dist.all_reduce(flat.div_(ranks))
    mean, shares, *means = flat.split([1, len(params), *(p.numel() for p in params)])
    for p, grad, share in zip(params, means, shares.tolist(), strict=True):
        p.grad = grad.view_as(p).to(p) if share > 0 else None
    return mean.reshape(()).to(loss)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
