"""Noise whose rows are scaled by the norms of a layer's weight rows and of their gradients, without forming either."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base_weight import whole, wide
from .layers import LoRALayer
from .perturbation import Draw

__all__ = ["RowNoise", "Rows"]

logger = logging.getLogger("flatlora")


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

    def weight_sq(self) -> tuple[Tensor, dict[str, Tensor]]:
        """``‖W'_i‖²`` (m,) over all active adapters, and DoRA's row factors by adapter name.

        Expands the square of ``diag(a)·W0 + Σ_k s_k·diag(c_k)·B_k·A_k``, so that W0 enters through ``‖W0_i‖²``, which
        is computed once, and through ``W0·Aᵀ`` alone. Everything is done block by block on a grid of g×g blocks, on
        which GraLoRA's adapters are low-rank adapters like any other; without GraLoRA g is 1.
        """
        layer = self.layer
        base_sq = self.base_sq
        if base_sq is None or layer.merged or layer.base.trainable:
            base_sq = layer.base.row_sq()
            if not (layer.merged or layer.base.trainable):
                self.base_sq = base_sq
        adapters = layer.adapters()
        if not adapters:
            return base_sq, {}
        dtype = wide(base_sq.device)
        grid = math.lcm(*(adapter.k for adapter in adapters))
        a_parts, b_parts = zip(*(adapter.blocks(grid) for adapter in adapters), strict=True)
        a = torch.cat(a_parts, 2)
        crossed = layer.base.apply_blocks(a).to(dtype)  # W0·Aᵀ
        a = a.to(dtype)
        ranks = [part.shape[2] for part in a_parts]
        parts: list[Tensor] = []
        factors = {adapter.name: torch.ones_like(base_sq) for adapter in adapters}
        base_factor = torch.ones_like(base_sq)
        for i, (a_k, b_k, crossed_k) in enumerate(
            zip(a.split(ranks, 2), b_parts, crossed.split(ranks, 3), strict=True)
        ):
            parts.append(b_k.to(dtype) * adapters[i].scaling)
            magnitude = adapters[i].magnitude
            if magnitude is None:
                continue
            norm_sq = base_sq + _row_dot(parts[i], 2 * crossed_k + parts[i] @ (a_k @ a_k.mT))
            scale = whole(magnitude).to(dtype) * norm_sq.rsqrt()
            # PEFT scales what the layer has computed so far, adapters before this one included.
            base_factor = base_factor * scale
            parts = [part * scale.view(grid, 1, -1, 1) for part in parts]
            for adapter in adapters[: i + 1]:
                factors[adapter.name] = factors[adapter.name] * scale
        b = torch.cat(parts, 3)
        cross = 2 * base_factor.view(grid, 1, -1, 1) * crossed
        return base_factor.square() * base_sq + _row_dot(b, cross + b @ (a @ a.mT)), factors

    def projected_grad_sq(self) -> Tensor | None:
        """``‖(P_B·G + G·P_A − P_B·G·P_A)_i‖²`` (m,), or None without gradients.

        As G·P_A lies in the row space of A and the rest is orthogonal to it, the squares of the two parts add up:
        with ``C = BᵀG = g_A/s`` and ``D = GAᵀ = g_B/s`` they are the row norms of ``B(BᵀB)⁺·C(I − P_A)`` and of
        ``D(AAᵀ)⁺·A``.

        GraLoRA's tangent space is the direct sum of its blocks', so each block is projected on its own and the squares
        add up along a block row. The plain adapter of a hybrid layer spans directions that the blocks partly span
        too; it is left out, and what stands for G is its projection on the blocks' tangent space alone.
        """
        layer = self.layer
        adapters = [
            (adapter, grads)
            for adapter in layer.adapters()
            if adapter.name in layer.names and adapter.scaling and (grads := adapter.grads()) is not None
        ]
        if not adapters:
            return None
        grid = max(adapter.k for adapter, _ in adapters)
        adapters = [(adapter, grads) for adapter, grads in adapters if adapter.k == grid]
        dtype = wide(layer.base.device)
        eps = torch.finfo(adapters[0][1][0].dtype).eps
        factors = self.weight_sq()[1] if any(adapter.magnitude is not None for adapter, _ in adapters) else {}
        parts: list[tuple[Tensor, ...]] = []
        for adapter, grads in adapters:
            a_k, b_k = (factor.to(dtype) for factor in adapter.blocks(grid))
            grad_a, grad_b = (grad.to(dtype) / adapter.scaling for grad in grads)
            c_k, d_k = grad_a.view(a_k.shape), grad_b.view(b_k.shape)
            if adapter.name in factors:
                factor = factors[adapter.name].view(grid, 1, -1, 1)
                b_k, d_k = b_k * factor, d_k / factor
            parts.append((a_k, b_k, c_k, d_k))
        a, b, c, d = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (2, 3, 2, 3), strict=True))
        gram_a, gram_b = _inverse(a @ a.mT, eps), _inverse(b.mT @ b, eps)
        rest = c - (c @ a.mT) @ gram_a @ a  # C(I − P_A)
        left = b @ gram_b
        return _row_dot(left, left @ (rest @ rest.mT)) + _row_dot(d, d @ gram_a)


class RowNoise:
    """The noise of all layers: its σ, β and step, and the rows it is scaled by.

    `everywhere` perturbs layers in eval mode as well, for measuring.
    """

    def __init__(
        self,
        layers: list[LoRALayer],
        sigma: float,
        beta: float,
        kind: Literal["gaussian", "low_rank"],
        rank: int,
        seed: int,
        everywhere: bool = False,
    ):
        self.rows = {layer.name: Rows(layer) for layer in layers}
        self.sigma, self.beta, self.kind, self.rank, self.seed = sigma, beta, kind, rank, seed
        self.everywhere = everywhere
        self.step = 0
        self.on = True
        self.held: dict[str, Draw | None] | None = None  # given to layers instead of what would be drawn
        self._observed: dict[str, Tensor] = {}
        self._warned = False

    def draw(self, layer: LoRALayer) -> Draw | None:
        if not (self.on and self.sigma > 0 and layer.active and (self.everywhere or layer.module.training)):
            return None
        if self.held is not None:
            return self.held.get(layer.name)
        return Draw(self.kind, self.std(self.rows[layer.name]), self._layer_seed(layer.name), self.rank)

    def _layer_seed(self, name: str) -> int:
        # A function of (seed, step, layer) rather than a running stream: every micro-batch, every recomputation, every
        # rank and a resumed run get the same ε, and nothing but these numbers has to be kept.
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def std(self, rows: Rows) -> Tensor:
        """Standard deviations (m,) of a layer's rows, computed when first asked for in a step."""
        adapters = rows.layer.adapters()
        tensors = [(a.A, a.B) if a.magnitude is None else (a.A, a.B, a.magnitude) for a in adapters]
        versions = [(a.name, a.scaling, *(t._version for t in ts)) for a, ts in zip(adapters, tensors, strict=True)]
        key = (self.step, self.sigma, self.beta, rows.layer.merged, versions)
        if rows.cached is None or rows.cached[0] != key:
            # Out of inference mode, or the first forward of a step under it would leave tensors unfit for autograd.
            # Nor under autocast, which would round the products.
            device = rows.layer.base.device
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                row_sq = rows.weight_sq()[0]
                if rows.grad_sq is not None:
                    row_sq = row_sq + self.beta * rows.grad_sq
                variance = row_sq.mul(self.sigma**2 / rows.layer.shape[1])
                rows.cached = key, variance.nan_to_num(0.0, posinf=0.0).clamp_(min=0.0).sqrt_()
        return rows.cached[1]

    @torch.no_grad()
    def observe_gradients(self) -> None:
        """Notes the norms of the gradients at hand for the next step's noise."""
        found = {name: new for name, rows in self.rows.items() if (new := rows.projected_grad_sq()) is not None}
        if not found and not self._warned:
            logger.warning("step() found no adapter gradients: the noise goes on without a gradient term")
            self._warned = True
        self._observed = found

    @torch.no_grad()
    def next_step(self) -> None:
        """Goes on to the next ε, scaled by the gradients noted last unless any of them is not finite."""
        self.step += 1
        if not self._observed:
            return
        # Decided on the device: asking the host whether all is finite would stall it at every step.
        sums = [new.sum() for new in self._observed.values()]
        finite = torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()
        for name, new in self._observed.items():
            old = self.rows[name].grad_sq
            keep = torch.zeros_like(new) if old is None else old
            self.rows[name].grad_sq = torch.where(finite.to(new.device), new, keep)
        self._observed = {}


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of a and b, on a grid of blocks (k, k, m/k, ·), summed along each row of the whole: (m,)."""
    return (a * b).sum((1, 3)).flatten()


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
