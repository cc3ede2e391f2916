"""Noise that a seed determines: drawn where it is used, and drawn again for backward.

Why ε is drawn and not ``x·εᵀ``, which for T tokens has fewer elements where T < n. Its columns are ``N(0,
d_i²·X·Xᵀ)``, so T·m normals and a Cholesky factor of ``X·Xᵀ`` make it. Backward then needs ``g·ε`` given what forward
drew: the part of ε in X's row space is known, and T·n more normals, a factor of ``g·diag(d²)·gᵀ`` and a projection
make the rest. That is exact for one forward and backward. But a step has one ε for all its micro-batches,
recomputations and ranks: the next micro-batch's product must be drawn given the X and g of all before it, which would
have to be kept, with factors of all their tokens together, and other ranks would need them too. At T = 140 and widths
of 384 to 1,536 it would save two to three quarters of the normals, against two factorisations, of matrices that equal
tokens make singular.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Draw", "draw_gaussian", "draw_low_rank"]

# Elements drawn at once on a CPU: they stay in a core's cache.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Draw:
    """One ε of a layer: everything needed to form it again, and nothing of its size.

    Row i of ε has standard deviation ``std[i]`` per element. ``"gaussian"`` draws every element independently;
    ``"low_rank"`` is ``diag(std)·U·V/√rank`` with standard normal U (m, rank) and V (rank, n), whose covariance is the
    same.
    """

    kind: Literal["gaussian", "low_rank"]
    std: Tensor
    seed: int
    rank: int = 0


def _generator(draw: Draw) -> torch.Generator | None:
    if draw.std.is_meta:  # shapes alone, and there are no generators of them
        return None
    return torch.Generator(draw.std.device).manual_seed(draw.seed)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In what noise is drawn: half precision would cost it its tails, so it is rounded once, after scaling."""
    return dtype if dtype == torch.float64 else torch.float32


def _normal(shape: tuple[int, ...], draw: Draw, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=_wide(dtype), device=draw.std.device).normal_(generator=generator)


def _quadruples() -> Tensor:
    """What normals are made of on a CPU, four at a time from 16 random bits: (65536, 4), in float32, 1 MiB.

    A row is four of 8,192 quantiles of ``|z|``, with signs from an orthogonal array of strength three. So the four have
    mean and skewness 0 and covariance I, to rounding; their kurtosis is 2.9974, none is beyond 4.01, and rows are drawn
    independently. What a model sees of ε, sums over a whole row of a weight, is normal as with any other normals.
    """
    steps = torch.arange(8192, dtype=torch.float64, device="cpu")
    quantiles = torch.special.ndtri(0.5 + (steps + 0.5) / 16384)
    quantiles /= quantiles.square().mean().sqrt()
    orders = [torch.randperm(8192, generator=torch.Generator().manual_seed(i), device="cpu") for i in range(4)]
    three = torch.cartesian_prod(*[1 - 2 * steps[:2]] * 3)
    signs = torch.cat([three, three.prod(1, keepdim=True)], 1)
    sizes = torch.stack([quantiles[order] for order in orders], 1)
    return (sizes.unsqueeze(1) * signs).view(-1, 4).float()


with torch.inference_mode(False):
    QUADRUPLES = _quadruples()


@torch.no_grad()
def draw_gaussian(draw: Draw, n: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``W + ε`` of shape (m, n) in a new tensor of `dtype`, or ε alone where `weight` is None.

    On a CPU, where torch draws normals on one core and slowly, ε is made of `QUADRUPLES`, unless it is float64.
    """
    m, generator, wide = draw.std.shape[0], _generator(draw), _wide(dtype)
    if draw.std.device.type != "cpu" or wide == torch.float64:
        return _scaled(_normal((m, n), draw, generator, dtype), draw.std, weight).to(dtype)
    new = draw.std.new_empty
    out, rows = new((m, n), dtype=dtype), max(1, min(m, _CHUNK // max(1, n)))
    bits = new(-(-rows * n // 16), dtype=torch.int64)  # 16 of them for four normals
    index = new(4 * bits.numel(), dtype=torch.int32)
    normals = new(16 * bits.numel(), dtype=wide)
    # Numbers of 16 bytes are gathered faster than rows of four.
    table, gathered = QUADRUPLES.view(torch.complex128).view(-1), normals.view(torch.complex128)
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        bits.random_(-(2**63), None, generator=generator)
        index.copy_(bits.view(torch.int16)).add_(1 << 15)
        torch.index_select(table, 0, index, out=gathered)
        noise = normals[: out[part].numel()].view(out[part].shape)
        _scaled(noise, draw.std[part], None if weight is None else weight[part], out[part])
    return out


def _scaled(noise: Tensor, std: Tensor, weight: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Noise of standard deviation one becomes ε, or W + ε, where it lies or in `out`."""
    std, out = std.to(noise.dtype).unsqueeze(1), noise if out is None else out
    return torch.mul(noise, std, out=out) if weight is None else torch.addcmul(weight, noise, std, out=out)


def draw_low_rank(draw: Draw, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors ``(B, A)`` of ``ε = B·A``, shapes (m, rank) and (rank, n)."""
    m, rank = draw.std.shape[0], draw.rank
    u, v = _normal(((m + n) * rank,), draw, _generator(draw), dtype).split([m * rank, n * rank])
    u = u.view(m, rank).mul_((draw.std * rank**-0.5).to(u.dtype).unsqueeze(1))
    return u.to(dtype), v.view(rank, n).to(dtype)
