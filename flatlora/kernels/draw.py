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

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Draw", "draw_gaussian", "draw_low_rank"]

# Elements drawn at once on a CPU: they stay in a core's cache, and are too few for torch to share them out once more.
_CHUNK = 1 << 15


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


@torch.no_grad()
def draw_gaussian(draw: Draw, n: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``W + ε`` of shape (m, n) in a new tensor of `dtype`, or ε alone where `weight` is None.

    On a CPU, where torch draws normals on one core, ε is drawn in chunks of rows, each from a seed of its own, on as
    many threads as torch has; it does not depend on their number.
    """
    m, device = draw.std.shape[0], draw.std.device
    if device.type != "cpu" or m * n <= _CHUNK:
        return _scaled(_normal((m, n), draw, _generator(draw), dtype), draw.std, weight).to(dtype)
    out = torch.empty((m, n), dtype=dtype, device=device)
    rows, inference = max(1, _CHUNK // n), torch.is_inference_mode_enabled()

    def fill(first: int, stride: int) -> None:
        """Every `stride`-th chunk from the `first` on; a thread starts without the modes of the one that asks."""
        generator = torch.Generator()
        with torch.inference_mode(inference), torch.no_grad():
            for start in range(first * rows, m, stride * rows):
                part = slice(start, start + rows)
                generator.manual_seed(draw.seed + start)
                drawn = out[part] if dtype == _wide(dtype) else torch.empty_like(out[part], dtype=_wide(dtype))
                drawn.normal_(generator=generator)
                _scaled(drawn, draw.std[part], None if weight is None else weight[part])
                if drawn.dtype != dtype:
                    out[part] = drawn

    _share(fill, -(-m // rows))
    return out


def _scaled(noise: Tensor, std: Tensor, weight: Tensor | None) -> Tensor:
    """Noise of standard deviation one becomes ε, or W + ε, where it lies."""
    std = std.to(noise.dtype).unsqueeze(1)
    return noise.mul_(std) if weight is None else torch.addcmul(weight, noise, std, out=noise)


_pool: ThreadPoolExecutor | None = None


def _share(fill: Callable[[int, int], None], chunks: int) -> None:
    """``fill(i, k)`` for each i below k, on k threads of which one is the caller's."""
    global _pool
    threads = min(torch.get_num_threads(), chunks)
    if threads > 1 and _pool is None:
        _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "flatlora-draw")
    others = [_pool.submit(fill, i, threads) for i in range(1, threads)] if _pool is not None else []
    fill(0, max(1, threads))
    for other in others:
        other.result()


def _forget_pool() -> None:
    """A forked process has its parent's pool without the threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def draw_low_rank(draw: Draw, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors ``(B, A)`` of ``ε = B·A``, shapes (m, rank) and (rank, n)."""
    m, rank = draw.std.shape[0], draw.rank
    u, v = _normal(((m + n) * rank,), draw, _generator(draw), dtype).split([m * rank, n * rank])
    u = u.view(m, rank).mul_((draw.std * rank**-0.5).to(u.dtype).unsqueeze(1))
    return u.to(dtype), v.view(rank, n).to(dtype)
