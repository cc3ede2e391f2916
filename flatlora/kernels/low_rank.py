"""Products with a weight and low-rank terms beside it, as one autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Added", "add_low_rank", "compute_dtype", "product_of"]


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or autocast's where it is on, which leaves float64 alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and dtype != torch.float64 else dtype


def product_of(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias`` in the dtype of W and in a tensor of its own.

    `F.linear` may return a view, which autograd forbids others to write to once a custom function has returned it.
    """
    out = torch.empty(*x.shape[:-1], W.shape[0], dtype=W.dtype, device=W.device)
    flat, rows = x.reshape(-1, x.shape[-1]).to(W.dtype), out.view(-1, W.shape[0])
    if bias is None:
        torch.mm(flat, W.t(), out=rows)
    else:
        torch.addmm(bias.to(W.dtype), flat, W.t(), out=rows)
    return out


class Added(torch.autograd.Function):
    """``out + x·Wᵀ + bias + Σ_k s_k·x·A_kᵀ·B_kᵀ + x·Aεᵀ·Bεᵀ``, of which any part may be missing.

    W (m, n), such as W0 + ε, lives during each of its two matmuls only: `matrix(weight)` makes it, and makes it again
    for backward; `weight` is the stored tensor that it is made from, or None. `factors` are A_1, B_1, A_2, B_2, …,
    which get gradients; `noise` is (Bε, Aε), which does not. All low-rank terms go through one pair of small matmuls in
    `dtype`, added in place, where PEFT launches two, a scaling and an addition for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor | None,
        in_place: bool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        matrix: Callable[[Any], Tensor] | None,
        noise: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
        scalings: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        ctx.matrix, ctx.scalings, ctx.ranks = matrix, scalings, [A.shape[0] for A in factors[0::2]]
        ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
        given, h, a, b = out, None, None, None
        with torch.autocast(x.device.type, enabled=False):
            if matrix is not None:
                W = matrix(weight)
                product = product_of(x, W, bias)
                # bitsandbytes' layers, whose weight is no float tensor, return the dtype they were given.
                if out is not None:
                    out = out + product.to(out.dtype)
                else:
                    out = product.to(x.dtype if weight is None else W.dtype)
                del W, product
            assert out is not None
            if factors or noise is not None:
                a_parts = [A.to(dtype) for A in factors[0::2]]
                b_parts = [B.to(dtype) * s for B, s in zip(factors[1::2], scalings, strict=True)]
                if noise is not None:
                    b_parts.append(noise[0])
                    a_parts.append(noise[1])
                a = torch.cat(a_parts) if len(a_parts) > 1 else a_parts[0]
                b = torch.cat(b_parts, 1) if len(b_parts) > 1 else b_parts[0]
                h = x.reshape(-1, x.shape[-1]).to(dtype) @ a.t()
                flat = rows = out.reshape(-1, out.shape[-1])
                if not (out.is_contiguous() and (in_place or out is not given)):
                    out = torch.empty(out.shape, dtype=out.dtype, device=out.device)
                    rows = out.view(flat.shape)
                if out.dtype != dtype:
                    rows.copy_(flat + h @ b.t())
                elif rows is flat:
                    rows.addmm_(h, b.t())
                else:
                    torch.addmm(flat, h, b.t(), out=rows)
            if out is given:
                ctx.mark_dirty(out)
        ctx.save_for_backward(weight, a, b, *((x, h) if any(ctx.needs_input_grad[9:]) else (None, None)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, a, b, x, h = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        grads: list[Tensor | None] = [None] * (2 * len(ctx.ranks))
        with torch.autocast(grad.device.type, enabled=False):
            grad_bias = g.sum(0) if ctx.needs_input_grad[4] else None
            if ctx.needs_input_grad[2] and ctx.matrix is not None:
                W = ctx.matrix(weight)
                grad_x = g.to(W.dtype) @ W
                del W
            if a is not None:
                g = g.to(a.dtype)
                gh = g @ b
                if ctx.needs_input_grad[2]:
                    grad_x = gh @ a if grad_x is None else grad_x.to(a.dtype).addmm_(gh, a)
                if x is not None:
                    r = sum(ctx.ranks)
                    grad_a = gh[:, :r].t() @ x.reshape(-1, x.shape[-1]).to(h.dtype)
                    grad_b = g.t() @ h[:, :r]
                    grads[0::2] = grad_a.split(ctx.ranks)
                    grads[1::2] = [part * s for part, s in zip(grad_b.split(ctx.ranks, 1), ctx.scalings, strict=True)]
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
        return grad if ctx.needs_input_grad[0] else None, None, grad_x, None, grad_bias, None, None, None, None, *grads


def add_low_rank(
    out: Tensor, x: Tensor, in_place: bool, dtype: torch.dtype, scalings: tuple[float, ...], *factors: Tensor
) -> Tensor:
    """``out + Σ_k s_k·x·A_kᵀ·B_kᵀ`` for the factors A_1, B_1, …; into `out` itself if `in_place`."""
    return Added.apply(out, in_place, x, None, None, None, None, dtype, scalings, *factors)
