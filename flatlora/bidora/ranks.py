"""Several processes, each with its share of every batch: what is averaged over them, and what begins alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["average_gradients", "begin_alike", "whole_model"]


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
