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

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .low_rank import cast

_BLOCK = 1 << 24  # elements drawn at a time
_CPU_BLOCK = 1 << 16  # on a CPU, in whose cache they stay
_TINY = 1 << 12  # elements for which setting up the table takes longer than drawing


@dataclass(frozen=True)
class Draw:
    """One ε of a layer: everything needed to form it again, and nothing of its size.

    ``"gaussian"`` draws every element independently, in row i with standard deviation ``std[i]``. ``"low_rank"`` is
    ``diag(std)·U·V`` with standard normal U (m, rank) and V (rank, n): with std smaller by √rank, its covariance is the
    same.
    """

    kind: Literal["gaussian", "low_rank"]
    std: Tensor
    seed: int
    rank: int = 0


def refuse_capture(device: torch.device) -> None:
    """RuntimeError while a CUDA graph is captured on `device`: what is decided on the host is not part of the graph."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and each replay would see the perturbation of the capture, whatever step "
            "it is of; capture neither passes that are perturbed nor optimizer.step(), or use torch.compile, which "
            "leaves the perturbation out of its graphs"
        )


def _generator(draw: Draw) -> torch.Generator | None:
    if draw.std.is_meta:  # shapes alone, and there are no generators of them
        return None
    refuse_capture(draw.std.device)
    return torch.Generator(draw.std.device).manual_seed(draw.seed)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that noise is drawn in: half precision would cut its tails, so it is rounded once, after scaling."""
    return dtype if dtype == torch.float64 else torch.float32


def _quadruples() -> Tensor:
    """What normals are made of on a CPU, four at a time from 16 random bits: (65536, 4), in float32, 1 MiB.

    A row is four of 4,096 quantiles of ``|z|``, with every pattern of signs. So all odd moments of the four are 0 and
    their covariance is I, to rounding; an element's kurtosis is 2.9953, none is beyond 3.85, and rows are drawn
    independently.
    """
    steps = torch.arange(4096, dtype=torch.float64, device="cpu")
    quantiles = torch.special.ndtri(0.5 + (steps + 0.5) / 8192)
    quantiles /= quantiles.square().mean().sqrt()
    orders = [torch.randperm(4096, generator=torch.Generator().manual_seed(i), device="cpu") for i in range(4)]
    sizes = torch.stack([quantiles[order] for order in orders], 1)
    signs = torch.cartesian_prod(*[1 - 2 * steps[:2]] * 4)
    return (sizes.unsqueeze(1) * signs).view(-1, 4).float()


_triton_on: frozenset[str] = frozenset()


def use_triton(*devices: str) -> None:
    """Has Gaussian noise on these kinds of device, such as "cuda", drawn by one Triton kernel; without any, by torch.

    The kernel saves a pass over ε in float32 for its writing and one for its reading. It was tested in Triton's
    interpreter and compiled, and never timed on a GPU, so it is off until it is asked for. Its noise is another for the
    same seed: choose before the first step, and alike when a run is resumed. float64 is drawn by torch in any case.

    Raises:
        ImportError: triton is not installed.
    """
    global _triton_on
    if devices:
        try:
            from . import triton_draw  # noqa: F401
        except ImportError as error:
            raise ImportError("noise is drawn by Triton, which is not installed: pip install triton") from error
    _triton_on = frozenset(devices)


_table: Tensor | None = None


def quadruples() -> Tensor:
    """`_quadruples`, made once."""
    global _table
    if _table is None:
        with torch.inference_mode(False):
            made = _quadruples()
        if type(made) is not Tensor:  # within a mode that makes others of them
            return made
        _table = made
    return _table


@torch.no_grad()
def draw_gaussian(draw: Draw, n: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``W + ε`` of shape (m, n) in a new tensor of `dtype`, or ε alone where `weight` is None.

    It is drawn in blocks of rows, so that no more than a block is ever there in float32. On a CPU, where torch draws
    normals on one core and slowly, ε of a layer that is not tiny is made of `quadruples`, unless it is float64.
    """
    if draw.std.device.type in _triton_on and _wide(dtype) == torch.float32:
        from .triton_draw import noisy_weight

        refuse_capture(draw.std.device)
        return noisy_weight(draw.std, draw.seed, n, weight, dtype)
    m, device, generator, wide = draw.std.shape[0], draw.std.device, _generator(draw), _wide(dtype)
    on_cpu = device.type == "cpu"
    rows = max(1, min(m, (_CPU_BLOCK if on_cpu else _BLOCK) // max(1, n)))
    # Neither of another dtype nor for tensors that only stand for others (FakeTensorMode).
    tabled = on_cpu and wide == torch.float32 and m * n >= _TINY and type(draw.std) is Tensor
    source = _Quadruples(rows, n) if tabled else torch.empty((rows, n), dtype=wide, device=device)
    out = torch.empty((m, n), dtype=dtype, device=device)
    stds = cast(draw.std, wide).unsqueeze(1)
    parts: Iterable[tuple[Tensor, Tensor, Tensor | None]] = [(out, stds, weight)]
    if rows < m:
        weights = itertools.repeat(None) if weight is None else weight.split(rows)
        parts = zip(out.split(rows), stds.split(rows), weights, strict=False)
    for target, std, stored in parts:
        normals = source.normal_(generator=generator)
        if target.shape != normals.shape:  # of the last rows
            normals = normals[: target.shape[0]]
        if stored is None:
            torch.mul(normals, std, out=target)
        else:
            torch.addcmul(stored, normals, std, out=target)
    return out


class _Quadruples:
    """A buffer of float32 normals (rows, n), filled anew by `normal_` as a tensor is."""

    def __init__(self, rows: int, n: int):
        bits = -(-rows * n // 16)  # 64 of them at a time
        self.bits = torch.empty(bits, dtype=torch.int64, device="cpu")
        self.index = torch.empty(4 * bits, dtype=torch.int32, device="cpu")
        normals = torch.empty(16 * bits, dtype=torch.float32, device="cpu")
        self.normals = normals[: rows * n].view(rows, n)
        # Numbers of 16 bytes are gathered faster than rows of four.
        self.table, self.gathered = quadruples().view(torch.complex128).view(-1), normals.view(torch.complex128)

    def normal_(self, generator: torch.Generator | None) -> Tensor:
        self.bits.random_(-(2**63), None, generator=generator)
        self.index.copy_(self.bits.view(torch.int16)).add_(1 << 15)
        torch.index_select(self.table, 0, self.index, out=self.gathered)
        return self.normals


def draw_low_rank(draw: Draw, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors ``(B, A)`` of ``ε = B·A``, shapes (m, rank) and (rank, n)."""
    m, rank = draw.std.shape[0], draw.rank
    normals = torch.empty((m + n) * rank, dtype=_wide(dtype), device=draw.std.device).normal_(
        generator=_generator(draw)
    )
    u, v = normals.split([m * rank, n * rank])
    u = u.view(m, rank).mul_(cast(draw.std, u.dtype).unsqueeze(1))
    return u.to(dtype), v.view(rank, n).to(dtype)


def rise_of(draw: Draw, x: Tensor, g: Tensor) -> Tensor:
    """``⟨G, ε⟩`` of a Gaussian draw for inputs x (T, n) and gradients of outputs g (T, m), as (1, 1)."""
    g = g.float() if g.dtype == torch.float16 else g  # in which a scaled loss's sum would overflow
    noise = draw_gaussian(draw, x.shape[1], None, g.dtype)
    return torch.dot((x.to(g.dtype) @ noise.t()).flatten(), g.flatten()).reshape(1, 1)
