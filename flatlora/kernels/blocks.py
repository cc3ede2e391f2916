"""Products with a grid of k×k low-rank blocks, as GraLoRA's update is.

``A`` is stored as (k, n/k, r) and ``B`` as (k, r, m/k), as `block_factors` of `flatlora.layers.adapter` reads them. On
a CPU the six products of a training step run nearly as fast per operation as the large ones beside them, so their
arithmetic, that of a LoRA of rank r, bounds what the adapter costs. Folding ΔW into a copy of W0 would save two and
cost as much in writing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .low_rank import compute_dtype, product_of, without_autocast


@dataclass(frozen=True)
class BlockOptions:
    """What the product with the blocks is scaled by, what dtype it is computed in, and whether it goes into `out`."""

    scaling: float
    dtype: torch.dtype
    in_place: bool = False


def add_blocks(
    how: BlockOptions,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    out: Tensor,
    recorded: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``out + s·x·ΔWᵀ`` in plain operations.

    The reference for `AddBlocks`, and what `torch.compile` gets, which can't trace the other's writes. `recorded` gets
    the product of x and A (k, T, r) and returns it, or a copy whose gradient it records.
    """
    h = _regroup(torch.bmm(_columns(x, A.shape[0]).to(how.dtype), A.to(how.dtype)))
    h = h if recorded is None else recorded(h)
    update = torch.bmm(h, B.to(how.dtype)).transpose(0, 1).reshape(out.shape)
    return out + (how.scaling * update).to(out.dtype)


class AddBlocks(torch.autograd.Function):
    """`add_blocks` through two batched matmuls, of which the second adds straight into its result.

    Without `out` it is ``x·weightᵀ + bias``, and backward adds the adapter's part of the input's gradient to that of
    the base. A and B are saved as they were given and cast again in backward: autograd then notices if an optimizer
    has moved them since, as it could not on casts that autocast asks for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: BlockOptions,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        out: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        base_dtype = None if weight is None else compute_dtype(x, weight.dtype)  # asked before autocast is off
        with without_autocast(x.device):
            if out is None:
                assert weight is not None and base_dtype is not None
                out = product_of(x, weight.to(base_dtype), bias)
            elif how.in_place and out.is_contiguous():
                ctx.mark_dirty(out)
            else:
                out = out.clone(memory_format=torch.contiguous_format)
            h = _regroup(torch.bmm(_columns(x, A.shape[0]).to(how.dtype), A.to(how.dtype)))
            columns = _columns(out, B.shape[0])
            if out.dtype == how.dtype:
                columns.baddbmm_(h, B.to(how.dtype), alpha=how.scaling)
            else:
                columns.add_(torch.bmm(h, B.to(how.dtype)), alpha=how.scaling)
        ctx.how = how
        ctx.save_for_backward(x, h, A, B, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B, weight = ctx.saved_tensors
        _, wants_x, wants_A, wants_B, wants_out, _, wants_bias = ctx.needs_input_grad
        scaling, dtype = ctx.how.scaling, ctx.how.dtype
        grad_x = grad_A = grad_B = None
        with without_autocast(x.device):
            if torch.is_grad_enabled():  # `create_graph`: through the parameters, not through values
                h = _regroup(torch.bmm(_columns(x, A.shape[0]).to(dtype), A.to(dtype)))
            g = _columns(grad, B.shape[0]).to(dtype)
            grad_h = _regroup(torch.bmm(g, B.to(dtype).mT * scaling))
            if wants_x:
                if weight is None:
                    grad_x = torch.empty(x.shape, dtype=dtype, device=x.device)
                else:
                    grad_x = (grad @ weight.to(grad.dtype)).to(dtype)
                _columns(grad_x, A.shape[0]).baddbmm_(grad_h, A.to(dtype).mT, beta=0 if weight is None else 1)
                grad_x = grad_x.to(x.dtype)
            if wants_A:
                grad_A = torch.bmm(_columns(x, A.shape[0]).to(dtype).mT, grad_h)
            if wants_B:
                grad_B = torch.bmm(h.mT, g).mul_(scaling)
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None
        return None, grad_x, grad_A, grad_B, grad if wants_out else None, None, grad_bias


def _columns(x: Tensor, k: int) -> Tensor:
    """The k column groups of x (..., n) as a view (k, T, n/k), where x is contiguous."""
    return x.reshape(-1, k, x.shape[-1] // k).transpose(0, 1)


def _regroup(h: Tensor) -> Tensor:
    """(k, T, r) per block column, each r made of k groups for the block rows, to the same per block row, and back."""
    k, tokens, r = h.shape
    return h.view(k, tokens, k, r // k).transpose(0, 2).reshape(k, tokens, r)
