"""Products with a grid of k×k low-rank blocks, as GraLoRA's update is.

``A`` is stored as (k, n/k, r) and ``B`` as (k, r, m/k), as `block_factors` of `flatlora.layers.adapter` reads them. On
a CPU the six products of a training step run nearly as fast per operation as the large ones beside them, so their
arithmetic, that of a LoRA of rank r, bounds what the adapter costs. Folding ΔW into a copy of W0 would save two and
cost as much in writing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .low_rank import compute_dtype, product_of

__all__ = ["AddBlocks", "add_blocks"]


def add_blocks(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``out + s·x·ΔWᵀ`` in plain operations: for `torch.compile`, which can't trace the writes of `AddBlocks`."""
    h = _regroup(torch.bmm(_columns(x, A.shape[0]).to(dtype), A.to(dtype)))
    update = torch.bmm(h, B.to(dtype)).transpose(0, 1).reshape(out.shape)
    return out + (scaling * update).to(out.dtype)


class AddBlocks(torch.autograd.Function):
    """``out + s·x·ΔWᵀ`` through two batched matmuls, of which the second adds straight into its result.

    Without `out` it is ``x·weightᵀ + bias``, and backward adds the adapter's part of the input's gradient to that of
    the base.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor | None,
        in_place: bool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.scaling = scaling
        base_dtype = None if weight is None else compute_dtype(x, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if out is None:
                assert weight is not None and base_dtype is not None
                out = product_of(x, weight.to(base_dtype), bias)
            elif in_place and out.is_contiguous():
                ctx.mark_dirty(out)
            else:
                out = out.clone(memory_format=torch.contiguous_format)
            A, B = A.to(dtype), B.to(dtype)
            h = _regroup(torch.bmm(_columns(x, A.shape[0]).to(dtype), A))
            columns = _columns(out, B.shape[0])
            if out.dtype == dtype:
                columns.baddbmm_(h, B, alpha=scaling)
            else:
                columns.add_(torch.bmm(h, B), alpha=scaling)
        ctx.save_for_backward(x, h, A, B, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, h, A, B, weight = ctx.saved_tensors
        grad_x = grad_bias = grad_A = grad_B = None
        with torch.autocast(x.device.type, enabled=False):
            g = _columns(grad, B.shape[0]).to(h.dtype)
            grad_h = _regroup(torch.bmm(g, B.mT * ctx.scaling))
            if ctx.needs_input_grad[2]:
                if weight is None:
                    grad_x = torch.empty(x.shape, dtype=h.dtype, device=x.device)
                else:
                    grad_x = (grad @ weight.to(grad.dtype)).to(h.dtype)
                _columns(grad_x, A.shape[0]).baddbmm_(grad_h, A.mT, beta=0 if weight is None else 1)
                grad_x = grad_x.to(x.dtype)
            if ctx.needs_input_grad[4]:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
            if ctx.needs_input_grad[5]:
                grad_A = torch.bmm(_columns(x, A.shape[0]).to(h.dtype).mT, grad_h)
            if ctx.needs_input_grad[6]:
                grad_B = torch.bmm(h.mT, g).mul_(ctx.scaling)
        return grad if ctx.needs_input_grad[0] else None, None, grad_x, None, grad_bias, grad_A, grad_B, None, None


def _columns(x: Tensor, k: int) -> Tensor:
    """The k column groups of x (..., n) as a view (k, T, n/k), where x is contiguous."""
    return x.reshape(-1, k, x.shape[-1] // k).transpose(0, 1)


def _regroup(h: Tensor) -> Tensor:
    """(k, T, r) per block column, each r made of k groups for the block rows, to the same per block row, and back."""
    k, tokens, r = h.shape
    return h.view(k, tokens, k, r // k).transpose(0, 2).reshape(k, tokens, r)
