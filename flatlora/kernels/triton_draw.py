"""``W + ε`` by one Triton kernel, which draws ε in registers: two bytes read and two written an element in bfloat16.

Normals are Philox's, numbered by their place in the weight, four by each counter: they depend on the seed, the shape
and nothing else, whereas torch's on CUDA depend on the GPU's model too. `use_triton` of `flatlora.kernels.draw` has
Gaussian noise drawn by it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_LANES = 256  # counters of a program; ε does not depend on it


@triton.jit(do_not_specialize=["seed"])
def _draw(out, weight, std, seed, size, n, row_stride, column_stride, added: tl.constexpr, lanes: tl.constexpr):
    """Writes ``std·normals``, to a weight if one is `added`: program i the 4·lanes elements from 4·lanes·i on."""
    program = tl.program_id(0)
    first, second, third, fourth = tl.randn4x(seed, program * lanes + tl.arange(0, lanes))
    normals = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    place = program.to(tl.int64) * (4 * lanes) + tl.arange(0, 4 * lanes)
    inside, row = place < size, place // n
    value = normals * tl.load(std + row, mask=inside, other=0.0)
    if added:
        stored = row * row_stride + (place % n) * column_stride
        value += tl.load(weight + stored, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def noisy_weight(std: Tensor, seed: int, n: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``W + ε`` (m, n) in `dtype`, ε alone where `weight` is None; computed in float32 and rounded once.

    Args:
        std: (m,), of the elements of ε's rows.
        seed: from 0 to 2⁶³ − 1.
        weight: (m, n), of any strides.
    """
    out = torch.empty(std.shape[0], n, dtype=dtype, device=std.device)
    if not out.numel():
        return out
    strides = (0, 0) if weight is None else weight.stride()
    grid = (triton.cdiv(out.numel(), 4 * _LANES),)
    on_device = getattr(torch.get_device_module(std.device), "device", nullcontext)
    with on_device(std.device):
        given = out if weight is None else weight
        _draw[grid](out, given, std.float(), seed, out.numel(), n, *strides, added=weight is not None, lanes=_LANES)
    return out
