"""What LoRA's gradients say of a weight's gradient: its projection on the adapters' tangent space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import wide
from .stack import BaseNorms, Stack, by_block, row_dot, stacked_blocks, weight_sq

__all__ = ["Projection", "project"]


@dataclass(frozen=True)
class Projection:
    """The projection of G (m, n) on ``{B·X + Y·A}``, in factors, for each of L layers and each of g×g blocks.

    LoRA's gradients determine ``C = BᵀG = g_A/s`` and ``D = GAᵀ = g_B/s``, and with ``P_B = B(BᵀB)⁺Bᵀ`` and
    ``P_A = Aᵀ(AAᵀ)⁺A`` the projection ``P_B·G + G·P_A − P_B·G·P_A`` is

        P(G) = left·rest + right·a,    left = B(BᵀB)⁺,  rest = C(I − P_A),  right = D(AAᵀ)⁺

    The two terms are orthogonal, row by row: one lies in the row space of A, the other is orthogonal to it.

    Attributes:
        left, right: (L, g, g, m/g, q).
        rest, a: (L, g, g, q, n/g).
        d: D, in the shape of `right`.
    """

    left: Tensor
    rest: Tensor
    right: Tensor
    a: Tensor
    d: Tensor

    def row_sq(self) -> Tensor:
        """``‖P(G)_i‖²`` (L, m). Blocks' tangent spaces are orthogonal, so their squares add up along a block row."""
        return row_dot(self.left, self.left @ (self.rest @ self.rest.mT)) + row_dot(self.d, self.right)


def project(stack: Stack, norms: BaseNorms) -> Projection | None:
    """The gradients of a stack's layers on the tangent space of the adapters they are seen through; None without any.

    The plain adapter of a hybrid GraLoRA layer spans directions that the blocks partly span too; it is left out, and
    what stands for G is its projection on the blocks' tangent space alone.
    """
    names = stack.layers[0].names
    trained = [same for same in stack.columns() if same[0].name in names and same[0].scaling and same[0].has_grads]
    if not trained:
        return None
    grid = max(same[0].k for same in trained)
    dtype = wide(stack.layers[0].base.device)
    dora = any(same[0].magnitude is not None for same in trained)
    row_factors = weight_sq(stack, norms)[1] if dora else {}
    parts: list[tuple[Tensor, ...]] = []
    for same in trained:
        if same[0].k < grid:
            continue
        a_k, b_k = (factor.to(dtype) for factor in stacked_blocks(same, grid))
        grads = [torch.stack(of_all) for of_all in zip(*(adapter.grads() for adapter in same), strict=True)]
        eps = torch.finfo(grads[0].dtype).eps
        c_k, d_k = (
            grad.to(dtype).view_as(factor) / same[0].scaling for grad, factor in zip(grads, (a_k, b_k), strict=True)
        )
        if dora:
            factor = by_block(row_factors[same[0].name], grid)
            b_k, d_k = b_k * factor, d_k / factor
        parts.append((a_k, b_k, c_k, d_k))
    a, b, c, d = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (3, 4, 3, 4), strict=True))
    gram_a, gram_b = _inverse(a @ a.mT, eps), _inverse(b.mT @ b, eps)
    return Projection(left=b @ gram_b, rest=c - (c @ a.mT) @ gram_a @ a, right=d @ gram_a, a=a, d=d)


def _inverse(gram: Tensor, eps: float) -> Tensor:
    """(X·Xᵀ)⁺ of Gram matrices (..., r, r) that may be singular, as B's is before the first step.

    A pseudo-inverse would need eigenvalues, which stall a GPU. A ridge keeps the matrix invertible, and three
    Newton-Schulz steps take it out again of every direction that stands above it: a ridge of δ beside an eigenvalue λ
    leaves a relative error of (δ/(λ + δ))⁸. Not below `eps`, the precision of the gradients, of the trace: smaller
    directions hold nothing but rounding.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    ridge = trace * max(eps, 1e-6) + torch.finfo(gram.dtype).tiny ** 0.5
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.cholesky_solve(eye, torch.linalg.cholesky_ex(gram + ridge * eye)[0])
    for _ in range(3):
        inverse = inverse @ (2 * eye - gram @ inverse)
    return inverse
