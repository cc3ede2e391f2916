"""Noise that a seed determines: drawn where it is used, and drawn again for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Draw", "draw_gaussian", "draw_low_rank"]


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


def _normal(shape: tuple[int, ...], draw: Draw, generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    # Half precision would cost the noise its tails; it is drawn in float32 and rounded once, after scaling.
    dtype = dtype if dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=draw.std.device).normal_(generator=generator)


def draw_gaussian(draw: Draw, n: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``W + ε`` of shape (m, n) in a new tensor of `dtype`, or ε alone where `weight` is None."""
    noise = _normal((draw.std.shape[0], n), draw, _generator(draw), dtype)
    std = draw.std.to(noise.dtype).unsqueeze(1)
    if weight is None:
        noise.mul_(std)
    else:
        torch.addcmul(weight, noise, std, out=noise)
    return noise.to(dtype)


def draw_low_rank(draw: Draw, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors ``(B, A)`` of ``ε = B·A``, shapes (m, rank) and (rank, n)."""
    generator = _generator(draw)
    u = _normal((draw.std.shape[0], draw.rank), draw, generator, dtype)
    v = _normal((draw.rank, n), draw, generator, dtype)
    u.mul_((draw.std * draw.rank**-0.5).to(u.dtype).unsqueeze(1))
    return u.to(dtype), v.to(dtype)
