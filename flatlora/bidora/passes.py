"""Forward-backward passes that leave no trace, and parameters that are elsewhere for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..streams import RandomStreams, private_streams
from .data import to_device

Values = dict[Tensor, Tensor]  # of parameters, or their gradients

__all__ = [
    "LossPass",
    "Values",
    "assign",
    "batch_pass",
    "devices_of",
    "finite",
    "frozen",
    "grads_of",
    "model_loss",
    "moved",
    "norm_of",
    "parameters_of",
    "running_statistics",
    "traceless",
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
def traceless(model: nn.Module, seed: int = 0, watch: Any = None) -> Iterator[None]:
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
