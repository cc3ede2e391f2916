"""The projection of a weight's gradient on the adapters' tangent space, from LoRA's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import sum_dtype
from .stack import BaseNorms, Stack, by_block, row_dot, stacked_blocks, weight_sq

Factors = tuple[Tensor, Tensor, Tensor, Tensor]

LEADING = 32  # the most directions of a projection that are kept
_PROBES = 8  # random directions from which what is left out is estimated


def project(stack: Stack, norms: BaseNorms) -> tuple[Factors, Tensor | None] | None:
    """V, Z, Y and U of ``P(G) = V·Z + Y·U``, the projection on ``{B·X + Y·A}`` of each layer's and block's gradient G.

    LoRA's gradients are ``C = BᵀG = g_A/s`` and ``D = GAᵀ = g_B/s``. With roots ``R_A·R_Aᵀ = (AAᵀ)⁺`` and
    ``R_B·R_Bᵀ = (BᵀB)⁺``, the rows of ``U = R_Aᵀ·A`` and the columns of ``V = B·R_B`` are orthonormal, or zero where A
    and B lack rank. With ``P_A = UᵀU`` and ``P_B = VVᵀ`` the projection is ``P_B·G + G·P_A − P_B·G·P_A``, so that

        Z = R_Bᵀ·C·(1 − UᵀU)    Y = D·R_A

    The two terms are orthogonal, row by row: one lies in the row space of A, the other is orthogonal to it. V and U are
    orthonormal, so that nothing cancels in a product that autocast rounds to bfloat16. The columns of ``B(BᵀB)⁺``
    would, where B is ill-conditioned.

    Where A is frozen, or its gradient is a sum over layers, C is unknown. B is then taken as zero, which leaves
    ``G·P_A``, the projection on ``{Y·A}``. Without D, A is taken as zero, which leaves ``P_B·G``, that on ``{B·X}``.

    Of a hybrid GraLoRA layer it is the tangent space of the blocks alone, as that of the plain adapter overlaps it.

    Where the rank, up to 2q, may be more than `LEADING`, it is that of the `leading` directions alone.

    Returns:
        V (L, g, g, m/g, q), Z (L, g, g, q, n/g), Y and U likewise, at least in float32, and the sum over all layers of
        the squared norm that is left out, None where none is; None without gradients.
    """
    names = stack.layers[0].names
    trained = [same for same in stack.columns() if same[0].name in names and same[0].scaling and same[0].has_grads]
    if not trained:
        return None
    grid = max(same[0].k for same in trained)
    dora = any(same[0].magnitude is not None for same in trained)
    row_factors = weight_sq(stack, norms)[1] if dora else {}
    parts: list[tuple[Tensor, ...]] = []
    for same in [same for same in trained if same[0].k == grid]:
        a_k, b_k = stacked_blocks(same, grid)
        dtype = torch.promote_types(a_k.dtype, torch.float32)
        a_k, b_k = a_k.to(dtype), b_k.to(dtype)
        grads = [torch.stack(of_all) for of_all in zip(*(adapter.grads() for adapter in same), strict=True)]
        eps = torch.finfo(grads[0].dtype).eps
        c_k, d_k = (
            grad.to(dtype).view_as(factor).div_(same[0].scaling) for grad, factor in zip(grads, (a_k, b_k), strict=True)
        )
        has_c, has_d = same[0].has_own_grads
        if not has_c:
            b_k, c_k = torch.zeros_like(b_k), torch.zeros_like(c_k)
        if not has_d:
            a_k, d_k = torch.zeros_like(a_k), torch.zeros_like(d_k)
        if dora:
            factor = by_block(row_factors[same[0].name], grid)
            b_k, d_k = b_k * factor, d_k / factor
        parts.append((a_k, b_k, c_k, d_k))
    a, b, c, d = (_joined(part, dim) for part, dim in zip(zip(*parts, strict=True), (3, 4, 3, 4), strict=True))
    if 2 * a.shape[3] > LEADING:
        return leading(a, b, c, d, eps)
    # In float64, as a Gram matrix has twice the condition of its factor.
    wide_a, wide_b = (factor.to(sum_dtype(factor.device)) for factor in (a, b))
    root_a, root_b = _roots(torch.stack([wide_a @ wide_a.mT, wide_b.mT @ wide_b]), eps).to(a.dtype)
    u, z = root_a.mT @ a, root_b.mT @ c
    return (b @ root_b, z - (z @ u.mT) @ u, d @ root_a, u), None


def leading(a: Tensor, b: Tensor, c: Tensor, d: Tensor, eps: float) -> tuple[Factors, Tensor]:
    """``P(G)·W·Wᵀ`` with orthonormal W (n, LEADING) by subspace iteration: V and Z are empty, Y and U are the factors.

    It forms no more of P(G) than its products with a few columns, and begins with random columns of ``G·P_A + P_B·G``,
    which span the same space and cost half as much. What it leaves out of ``Σ_layers ‖P(G)‖_F²`` is estimated without
    bias.
    """
    of_a, root_a = _inverse(a, eps)
    of_b, _ = _inverse(b.mT, eps)

    def product(W: Tensor) -> Tensor:
        """``P(G)·W``"""
        y = of_a(a @ W)
        return b @ of_b(c @ (W - a.mT @ y)) + d @ y

    def transposed(Z: Tensor) -> Tensor:
        """``P(G)ᵀ·Z``"""
        x = c.mT @ of_b(b.mT @ Z)
        return x + a.mT @ of_a(d.mT @ Z - a @ x)

    # A stream of its own that begins anew in every step: nothing to be saved, and no other stream is moved.
    generator = None if a.is_meta else torch.Generator(a.device).manual_seed(0)

    def normals(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=a.dtype, device=a.device).normal_(generator=generator)

    *_, r, n = a.shape
    start = d @ (root_a @ normals(r, LEADING)) + b @ of_b(c @ normals(n, LEADING))
    probes = normals(n, _PROBES)
    W = _orthonormal(transposed(_orthonormal(start)))
    y, rest = product(torch.cat([W, probes - W @ (W.mT @ probes)], -1)).split([LEADING, _PROBES], -1)
    return (b[..., :0], c[..., :0, :], y, W.mT), rest.square().sum(dtype=sum_dtype(a.device)) / _PROBES


def projection_row_sq(factors: Factors) -> Tensor:
    """``‖P(G)_i‖²`` (L, m). Blocks' tangent spaces are orthogonal, so their squares add up along a block row."""
    v, z, y, _ = factors
    return (row_dot(v, v @ (z @ z.mT)) + row_dot(y, y)).to(sum_dtype(v.device))


def _joined(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _roots(gram: Tensor, eps: float) -> Tensor:
    """R with ``R·Rᵀ = M⁺``, for Gram matrices M (..., r, r) that may be singular, as B's is before the first step.

    A pseudo-inverse would need eigenvalues, which stall a GPU. Here a ridge δ keeps the matrix invertible, and a series
    removes it again: with ``M + δ = L·Lᵀ`` and ``E = δ·L⁻¹·L⁻ᵀ``,

        M⁺ ≈ L⁻ᵀ·(1 + E + ... + E⁷)·L⁻¹

    with a relative error of (δ/(λ + δ))⁸ at an eigenvalue λ. δ is at least `eps`, the precision of the gradients, times
    the trace: smaller eigenvalues are rounding.
    """
    ridge = max(eps, 1e-6)
    inverse, scale = _whitening(gram, ridge)
    one = ridge * inverse @ inverse.mT
    two = one @ one
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    series = (eye + one) @ (eye + two) @ (eye + two @ two)
    return scale * inverse.mT @ torch.linalg.cholesky_ex(series)[0]


def _whitening(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """L⁻¹ and c, with ``c²·M + ridge = L·Lᵀ`` and c² one over M's trace; c is zero for M = 0."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scale = torch.where(trace > 0, trace.rsqrt(), 0.0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    lower = torch.linalg.cholesky_ex(gram * scale.square() + ridge * eye)[0]
    return torch.linalg.solve_triangular(lower, eye, upper=False), scale


def _inverse(rows: Tensor, eps: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What multiplies columns by ``(A·Aᵀ)⁺``, for the many rows of A, and an R with ``R·Rᵀ = (A·Aᵀ + δ)⁻¹``.

    As in `_roots`, whose products of r×r matrices would be most of the cost here, but with two terms of the series,
    ``(1 + δ·N)·N`` with ``N = (A·Aᵀ + δ)⁻¹``, and in the factors' precision. In float32 singular values of A below
    about 1e-3·‖A‖_F are lost. The Cholesky factor is safe there: δ is 16 units of rounding times the trace, and its
    error for p rows of equal size no more than p units times a p-th of it.
    """
    ridge = max(8 * torch.finfo(rows.dtype).eps, 1e-12, eps**2)
    plain, scale = _whitening(rows @ rows.mT, ridge)
    root = scale * plain.mT

    def inverse(columns: Tensor) -> Tensor:
        once = root @ (root.mT @ columns)
        return once + ridge * (plain.mT @ (plain @ once))  # whose scale is 1, so that it stays finite

    return inverse, root


def _orthonormal(columns: Tensor) -> Tensor:
    """Columns Q (..., m, k) with ``Q·Qᵀ`` the projection on the space that the given ones span."""
    wide = columns.to(sum_dtype(columns.device))
    return columns @ _roots(wide.mT @ wide, torch.finfo(columns.dtype).eps).to(columns.dtype)


def product_sq(B: Tensor, A: Tensor) -> Tensor:
    """``Σ ‖B·A‖_F²`` of all products in a stack, B (..., m, r) and A (..., r, n), in float64 where the device has it.

    By ``‖B·A‖_F² = Σ (BᵀB)∘(AAᵀ)``: nothing larger than r×r is formed.
    """
    dtype = sum_dtype(B.device)
    B, A = B.to(dtype), A.to(dtype)
    return ((B.mT @ B) * (A @ A.mT)).sum()
