"""Forward-backward passes that leave no trace, over all ranks, and parameters that are elsewhere for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ranks import world_size
from ..streams import RandomStreams, private_streams
from ..wrapper import wrappers_of

Values = dict[Tensor, Tensor]  # of parameters, or their gradients


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


@dataclass(frozen=True)
class LowerPass:
    """Where a lower step begins: V, what perturbs the model there, L_tr with its passes, and ∂_μ L_tr where taken."""

    V: Values
    perturbations: list[Any]
    passes: list[LossPass]
    loss: Tensor
    magnitude_grads: Values


def model_loss(output: Any) -> Tensor | None:
    """The loss in what a model returned, if it has one."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def batch_loss(model: nn.Module, batch: Any, which: str, loss_fn: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    """``loss_fn(model, batch)``, or ``model(**batch).loss``; ValueError if that is no scalar to go backward from."""
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


def parts_of(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[torch.device]]:
    """The parameters that require a gradient, the buffers of running statistics, and the devices of all parameters.

    Of this moment, in one walk through the modules. Batches go to the first device.
    """
    params: dict[Tensor, None] = {}
    statistics: list[Tensor] = []
    for module in model.modules():
        params.update(dict.fromkeys(p for p in module._parameters.values() if p is not None))
        if module.__dict__.get("track_running_stats"):  # as BatchNorm's, which passes in train mode update
            statistics += module.buffers(recurse=False)
    return [p for p in params if p.requires_grad], statistics, list(dict.fromkeys(p.device for p in params))


def finite(*numbers: tuple[str, Tensor]) -> list[float]:
    """Named numbers on the host, fetched at once; ValueError for the first that is not finite."""
    first = numbers[0][1]
    values = torch.stack([number.reshape(()).to(first) for _, number in numbers]).tolist()
    for (name, _), value in zip(numbers, values, strict=True):
        if not math.isfinite(value):
            advice = "Look at the batch, or lower the learning rate"
            raise ValueError(f"the {name} is {value}; parameters are left as they were. {advice}")
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
    if not values:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    norms = torch._foreach_norm(list(values.values()))
    return torch.stack([norm.to(norms[0]) for norm in norms]).norm()


@torch.no_grad()
def copies(tensors: Iterable[Tensor]) -> Values:
    """What they hold now, for `assign`."""
    return {tensor: tensor.clone() for tensor in tensors}


@torch.no_grad()
def assign(values: Values) -> None:
    """Writes the values into their parameters or buffers."""
    for p, value in values.items():
        p.copy_(value)


@contextmanager
def moved(values: Values) -> Iterator[None]:
    """Within the context the parameters have these values; afterwards the very bits they had."""
    present = copies(values)
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


@contextmanager
def isolated(model: nn.Module, watch: Any, seed: int = 0) -> Iterator[None]:
    """Puts gradients, random streams and running statistics back afterwards; within, the streams start at `seed`.

    Nor does `watch`, a `LoopWatch`, see what is done within.
    """
    trained, statistics, devices = parts_of(model)
    with private_streams(seed, devices), watch.paused(), ExitStack() as undo:
        undo.callback(assign, copies(statistics))
        for p in trained:
            undo.callback(setattr, p, "grad", p.grad)
            p.grad = None  # backward would add to it in place
        yield


@contextmanager
def together(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enters all of them, the first first."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def undone_on_error(
    model: nn.Module, optimizers: Sequence[Optimizer], batches: Iterable[Any], watch: Any
) -> Iterator[None]:
    """If the context ends in an exception, everything is as it was before, and the exception goes on.

    That is the parameters that the optimizers hold, their `state` and groups and what their wrappers keep, the
    gradients and running statistics of the model, the random streams, the positions in `batches` (`Batches` or None),
    and what `watch` has seen. What a base optimizer keeps elsewhere cannot be known and stays as it has become.
    """
    trained, statistics, devices = parts_of(model)
    sources = [getattr(wrapper, "_source", None) for optimizer in optimizers for wrapper in wrappers_of(optimizer)]
    with ExitStack() as undo:
        undo.callback(RandomStreams(devices).restore)
        undo.callback(watch.restore, watch.snapshot())
        for source in filter(None, sources):
            undo.callback(source.restore, *source.snapshot())
        for loader in filter(None, batches):
            undo.callback(loader.restore, loader.position)
        with torch.no_grad():
            for optimizer in optimizers:
                undo.callback(_bring_back, optimizer, *_kept(optimizer))
            for p in trained:
                undo.callback(setattr, p, "grad", _copied(p.grad))
        undo.callback(assign, copies([*statistics, *(p for optimizer in optimizers for p in parameters_of(optimizer))]))
        yield
        undo.pop_all()  # no error: nothing is undone


def _kept(optimizer: Optimizer) -> tuple[Any, Any, Any]:
    """Copies of an optimizer's state and groups and of what its wrappers keep."""
    # Not its state_dict(), whose loading rounds moments to the parameters' type.
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return _copied((dict(optimizer.state), groups, [wrapper.method_state() for wrapper in wrappers_of(optimizer)]))


def _bring_back(optimizer: Optimizer, state: Any, groups: Any, methods: Any) -> None:
    _make_equal(optimizer.state, state)
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        _make_equal(group, {**kept, "params": group["params"]})
    for wrapper, own in zip(wrappers_of(optimizer), methods, strict=True):
        if own:
            wrapper.load_method_state(own)


def _copied(value: Any) -> Any:
    """A copy down to the tensors; other objects than these, dicts, lists and tuples are taken to be immutable."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


@torch.no_grad()
def _make_equal(present: dict[Any, Any], kept: dict[Any, Any]) -> None:
    """Makes `present` what `kept` is; tensors in place where that can be, as a CUDA graph may hold them."""
    for key in present.keys() - kept.keys():
        del present[key]
    for key, value in kept.items():
        now = present.get(key)
        if isinstance(now, dict) and isinstance(value, dict):
            _make_equal(now, value)
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
    for p in params if world_size() > 1 else ():
        dist.broadcast(p.detach(), 0)


@torch.no_grad()
def average_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Makes the model's gradients their means over the ranks, by one reduction, and returns the mean of the losses.

    A gradient that only some ranks have is zero on the others. The same parameters must be trained on all.
    """
    if (ranks := world_size()) == 1:
        return loss
    params, *_ = parts_of(model)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    there = torch.tensor([p.grad is not None for p in params])
    flat = torch.cat([part.flatten().to(loss.device) for part in (loss, there, *parts)])
    dist.all_reduce(flat.div_(ranks))
    mean, shares, *means = flat.split([1, len(params), *(p.numel() for p in params)])
    for p, grad, share in zip(params, means, shares.tolist(), strict=True):
        p.grad = grad.view_as(p).to(p) if share > 0 else None
    return mean.reshape(()).to(loss)
