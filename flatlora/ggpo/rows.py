"""Row norms of effective weights and of their gradients, without forming either."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.adapter import Adapter
from ..layers.base import whole, wide
from ..layers.view import LoRALayer

__all__ = ["Batch", "Rows", "batches", "projected_grad_sq", "weight_sq"]

_BATCH = 1 << 19  # elements of the adapters of layers that are computed together


@dataclass
class Rows:
    """What is remembered of one layer: squared row norms of its weights and of its last gradient."""

    layer: LoRALayer
    grad_sq: Tensor | None = None
    base_sq: Tensor | None = None
    cached: tuple[Any, Tensor] | None = None  # (what it was computed from, standard deviations)

    def ranks(self) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for adapter in self.layer.all_adapters():  # a hybrid GraLoRA layer has two of a name
            ranks[adapter.name] = ranks.get(adapter.name, 0) + adapter.rank
        return ranks

    def frozen_sq(self) -> Tensor:
        """``‖W0_i‖²`` (m,), computed once unless W0 is not frozen after all."""
        base = self.layer.base
        if self.layer.merged or base.trainable:
            self.base_sq = None
            return base.row_sq()
        self.base_sq = base.row_sq() if self.base_sq is None else self.base_sq.to(base.device)
        return self.base_sq

    def at_hand(self, device: torch.device) -> bool:
        """Whether all its tensors are whole and on `device`, as those of a sharded layer are in its forward alone."""
        parameters = self.layer.module.parameters()
        whole_here = all(p.device == device and p.numel() and not hasattr(p, "full_tensor") for p in parameters)
        return whole_here and self.layer.base.kind != "opaque"


@dataclass
class Batch:
    """Layers of one form, and the adapters of each: the same number, of the same shapes and scalings."""

    rows: list[Rows]
    adapters: list[list[Adapter]]


def batches(layers: Iterable[Rows]) -> Iterator[Batch]:
    """Layers of one form together, as many as have a bounded size.

    The algebra of a layer is some forty operations on small matrices. Launching them costs more than their arithmetic,
    so they are launched once for many layers, stacked along a first dimension L.
    """
    alike: dict[Any, list[tuple[Rows, list[Adapter]]]] = {}
    for rows in layers:
        layer, adapters = rows.layer, rows.layer.adapters()
        forms = [(a.name, a.k, a.rank, a.scaling, a.A.dtype, a.magnitude is None, a.has_grads) for a in adapters]
        key = (layer.shape, layer.base.device, layer.names, tuple(forms))
        alike.setdefault(key, []).append((rows, adapters))
    for (shape, _, _, forms), group in alike.items():
        most = max(1, _BATCH // max(1, sum(shape) * sum(rank for _, _, rank, *_ in forms)))
        for i in range(0, len(group), most):
            part = group[i : i + most]
            yield Batch([rows for rows, _ in part], [adapters for _, adapters in part])


def weight_sq(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """``‖W'_i‖²`` (L, m) over all active adapters, and DoRA's row factors by adapter name.

    Expands the square of ``diag(a)·W0 + Σ_k s_k·diag(c_k)·B_k·A_k``, so that W0 enters through ``‖W0_i‖²``, which
    is computed once, and through ``W0·Aᵀ`` alone. Everything is done block by block on a grid of g×g blocks, on
    which GraLoRA's adapters are low-rank adapters like any other; without GraLoRA g is 1.
    """
    base_sq = torch.stack([rows.frozen_sq() for rows in batch.rows])
    adapters = batch.adapters[0]
    if not adapters:
        return base_sq, {}
    grid = math.lcm(*(adapter.k for adapter in adapters))
    a_parts, b_parts = zip(
        *(_stacked(a.blocks(grid) for a in same) for same in zip(*batch.adapters, strict=True)), strict=True
    )
    a = torch.cat(a_parts, 3)
    crossed = torch.stack([rows.layer.base.apply_blocks(own) for rows, own in zip(batch.rows, a, strict=True)])  # W0·Aᵀ
    # Sums of r products need no more than float32; they go to ‖W0_i‖², of many more, which is wider.
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, crossed = a.to(dtype), crossed.to(dtype)
    ranks = [part.shape[3] for part in a_parts]
    parts: list[Tensor] = []
    base_factor = torch.ones_like(base_sq, dtype=dtype)
    factors = {adapter.name: base_factor for adapter in adapters}
    for i, (a_k, b_k, crossed_k) in enumerate(zip(a.split(ranks, 3), b_parts, crossed.split(ranks, 4), strict=True)):
        parts.append(b_k.to(dtype) * adapters[i].scaling)
        magnitudes = [whole(found) for own in batch.adapters if (found := own[i].magnitude) is not None]
        if not magnitudes:
            continue
        norm_sq = base_sq + _row_dot(parts[i], 2 * crossed_k + parts[i] @ (a_k @ a_k.mT))
        scale = torch.stack(magnitudes).to(dtype) * norm_sq.rsqrt().to(dtype)
        # PEFT scales what the layer has computed so far, adapters before this one included.
        base_factor = base_factor * scale
        parts = [part * _by_block(scale, grid) for part in parts]
        for adapter in adapters[: i + 1]:
            factors[adapter.name] = factors[adapter.name] * scale
    b = torch.cat(parts, 4)
    cross = 2 * _by_block(base_factor, grid) * crossed
    return base_factor.square() * base_sq + _row_dot(b, cross + b @ (a @ a.mT)), factors


def projected_grad_sq(batch: Batch) -> Tensor | None:
    """``‖(P_B·G + G·P_A − P_B·G·P_A)_i‖²`` (L, m), or None without gradients.

    As G·P_A lies in the row space of A and the rest is orthogonal to it, the squares of the two parts add up:
    with ``C = BᵀG = g_A/s`` and ``D = GAᵀ = g_B/s`` they are the row norms of ``B(BᵀB)⁺·C(I − P_A)`` and of
    ``D(AAᵀ)⁺·A``.

    GraLoRA's tangent space is the direct sum of its blocks', so each block is projected on its own and the squares
    add up along a block row. The plain adapter of a hybrid layer spans directions that the blocks partly span
    too; it is left out, and what stands for G is its projection on the blocks' tangent space alone.
    """
    names = batch.rows[0].layer.names
    each = [same for same in zip(*batch.adapters, strict=True) if same[0].name in names]
    trained = [same for same in each if same[0].scaling and same[0].has_grads]
    if not trained:
        return None
    grid = max(same[0].k for same in trained)
    dtype = wide(batch.rows[0].layer.base.device)
    dora = any(same[0].magnitude is not None for same in trained)
    factors = weight_sq(batch)[1] if dora else {}
    parts: list[tuple[Tensor, ...]] = []
    for same in trained:
        if same[0].k < grid:
            continue
        a_k, b_k = (factor.to(dtype) for factor in _stacked(adapter.blocks(grid) for adapter in same))
        grads = _stacked(adapter.grads() for adapter in same)
        eps = torch.finfo(grads[0].dtype).eps
        c_k, d_k = (
            grad.to(dtype).view_as(factor) / same[0].scaling for grad, factor in zip(grads, (a_k, b_k), strict=True)
        )
        if dora:
            factor = _by_block(factors[same[0].name], grid)
            b_k, d_k = b_k * factor, d_k / factor
        parts.append((a_k, b_k, c_k, d_k))
    a, b, c, d = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (3, 4, 3, 4), strict=True))
    gram_a, gram_b = _inverse(a @ a.mT, eps), _inverse(b.mT @ b, eps)
    rest = c - (c @ a.mT) @ gram_a @ a  # C(I − P_A)
    left = b @ gram_b
    return _row_dot(left, left @ (rest @ rest.mT)) + _row_dot(d, d @ gram_a)


def _stacked(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The same pair of tensors of many layers, along a new first dimension."""
    first, second = zip(*pairs, strict=True)
    return torch.stack(first), torch.stack(second)


def _by_block(rows: Tensor, grid: int) -> Tensor:
    """Values of rows (L, m) in a shape that multiplies the rows of a grid of blocks (L, k, k, m/k, ·)."""
    return rows.view(len(rows), grid, 1, -1, 1)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of a and b, grids of blocks (L, k, k, m/k, ·), summed along whole rows: (L, m)."""
    return (a * b).sum((2, 4)).flatten(1)


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
