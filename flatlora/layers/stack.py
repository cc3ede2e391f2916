"""Many alike layers computed at once (`Stack`), and row norms of their effective weights, without forming one.

A layer takes some forty operations on small matrices, which cost more to launch than to compute. So they are launched
once for many layers, stacked along a first dimension L. The weight is taken as a grid of g×g blocks, on each of which
GraLoRA's adapters are low-rank adapters; without GraLoRA g is 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.draw import refuse_capture
from .adapter import Adapter
from .base import BaseWeight, full_tensor, stacked_row_sq
from .view import LoRALayer

_T = TypeVar("_T")

_MOST = 1 << 24  # elements of the adapters that are computed together
_CPU_MOST = 1 << 19  # on a CPU, in whose cache they stay


@dataclass(frozen=True)
class Stack:
    """Alike layers, and the adapters of each: the same number, of the same shapes and scalings."""

    layers: list[LoRALayer]
    adapters: list[list[Adapter]]

    def columns(self) -> list[tuple[Adapter, ...]]:
        """The first adapter of every layer, the second of every layer, and so on."""
        return list(zip(*self.adapters, strict=True))


def chunks(group: list[_T], elements: int, device: torch.device) -> Iterator[list[_T]]:
    """Parts of a bounded size of a group whose members have that many elements each, to be computed together."""
    most = max(1, (_CPU_MOST if device.type == "cpu" else _MOST) // max(1, elements))
    return (group[i : i + most] for i in range(0, len(group), most))


def stacks(layers: Iterable[LoRALayer], known: Mapping[str, list[Adapter]] | None = None) -> Iterator[Stack]:
    """Alike layers together, in `chunks`; with the adapters in `known` by layer, else those they add now."""
    alike: dict[tuple, list[tuple[LoRALayer, list[Adapter]]]] = {}
    read = [(layer, layer.adapters() if known is None else known[layer.name]) for layer in layers]
    for layer, adapters in _with_shared(read):
        kinds = tuple(
            (a.name, a.k, a.rank, a.scaling, a.A.dtype, a.magnitude is None, a.has_grads, a.has_own_grads)
            for a in adapters
        )
        device = adapters[0].A.device if adapters else layer.base.device
        alike.setdefault((layer.shape, device, layer.names, kinds), []).append((layer, adapters))
    for (shape, device, _, kinds), group in alike.items():
        refuse_capture(device)
        for part in chunks(group, sum(shape) * sum(rank for _, _, rank, *_ in kinds), device):
            yield Stack([layer for layer, _ in part], [adapters for _, adapters in part])


def _with_shared(read: list[tuple[LoRALayer, list[Adapter]]]) -> list[tuple[LoRALayer, list[Adapter]]]:
    """The same with `Adapter.shared` set."""
    uses = Counter(id(p) for _, adapters in read for a in adapters for p in a.params)
    if not any(count > 1 for count in uses.values()):
        return read
    return [
        (layer, [replace(a, shared=(uses[id(a.A_param)] > 1, uses[id(a.B_param)] > 1)) for a in adapters])
        for layer, adapters in read
    ]


class BaseNorms:
    """``‖W0_i‖²`` (m,) of layers. It is computed once for a frozen W0, and again when that is written to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...] | None, Tensor]] = {}

    def of(self, layers: Sequence[LoRALayer]) -> Tensor:
        """Of layers of one shape on one device: (L, m)."""
        bases = [layer.base for layer in layers]
        rows = [self._look_up(layer, base) for layer, base in zip(layers, bases, strict=True)]
        missing = [i for i, known in enumerate(rows) if known is None]
        computed = stacked_row_sq([bases[i] for i in missing]) if missing else ()
        for i, row in zip(missing, computed, strict=True):
            rows[i] = row
            if _is_frozen(layers[i], bases[i]):
                self._known[layers[i].name] = bases[i].version, row
        return torch.stack([row for row in rows if row is not None])

    def _look_up(self, layer: LoRALayer, base: BaseWeight) -> Tensor | None:
        """What is known and has not changed."""
        former, known = self._known.pop(layer.name, (None, None))
        version = base.version or former  # a sharded weight has one within its own forward alone
        written = former is not None and version != former
        if known is None or written or not _is_frozen(layer, base):
            return None
        known = known.to(base.device)
        self._known[layer.name] = version, known
        return known


def _is_frozen(layer: LoRALayer, base: BaseWeight) -> bool:
    return not (layer.merged or base.trainable)


def weight_sq(stack: Stack, norms: BaseNorms) -> tuple[Tensor, dict[str, Tensor]]:
    """``‖W'_i‖²`` (L, m) over all active adapters, and DoRA's row factors (L, m) by adapter name.

    With ``W' = diag(a)·W0 + b·A``, where A stacks the adapters' rows and b their columns ``s_k·diag(c_k)·B_k``,

        ‖W'_i‖² = a_i²·‖W0_i‖² + 2·a_i·b_i·(W0·Aᵀ)_iᵀ + b_i·(A·Aᵀ)·b_iᵀ
    """
    base_sq = norms.of(stack.layers)
    columns = stack.columns()
    if not columns:
        return base_sq, {}
    grid = math.lcm(*(same[0].k for same in columns))
    factors = [stacked_blocks(same, grid) for same in columns]
    a = torch.cat([a_k for a_k, _ in factors], 3)
    crossed = base_products(stack.layers, a)
    # Sums of r products need no more than float32; they go to ‖W0_i‖², of many more, which is wider.
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, crossed = a.to(dtype), crossed.to(dtype)
    ranks = [a_k.shape[3] for a_k, _ in factors]
    b_parts: list[Tensor] = []
    base_factor = torch.ones_like(base_sq, dtype=dtype)
    row_factors = {same[0].name: base_factor for same in columns}
    for i, same in enumerate(columns):
        a_k, crossed_k = a.split(ranks, 3)[i], crossed.split(ranks, 4)[i]
        b_parts.append(factors[i][1].to(dtype) * same[0].scaling)
        magnitudes = [full_tensor(adapter.magnitude) for adapter in same if adapter.magnitude is not None]
        if not magnitudes:
            continue
        norm_sq = base_sq + row_dot(b_parts[i], 2 * crossed_k + b_parts[i] @ (a_k @ a_k.mT))
        scale = torch.stack(magnitudes).to(dtype) * norm_sq.rsqrt().to(dtype)
        # PEFT scales what the layer has computed so far, adapters before this one included.
        base_factor = base_factor * scale
        b_parts = [b_k * by_block(scale, grid) for b_k in b_parts]
        for before in columns[: i + 1]:
            row_factors[before[0].name] = row_factors[before[0].name] * scale
    b = torch.cat(b_parts, 4)
    cross = 2 * by_block(base_factor, grid) * crossed
    return base_factor.square() * base_sq + row_dot(b, cross + b @ (a @ a.mT)), row_factors


def base_products(layers: Iterable[LoRALayer], a: Tensor) -> Tensor:
    """``W0·Aᵀ`` (L, g, g, m/g, q) of layers, for rows a (L, g, g, q, n/g).

    A bfloat16 W0 is not upcast where the device mixes dtypes: a is the sum, to the bit, of three bfloat16 tensors, and
    their products are exact in float32 and summed there. So the result is rounded as a product in float32 is.
    """
    bases = [layer.base for layer in layers]
    split = a.dtype == torch.float32 and all(base.mixes for base in bases)
    rows = torch.cat(bfloat16_parts(a), 3) if split else a
    products = torch.stack([base.apply_blocks(own) for base, own in zip(bases, rows, strict=True)])
    return products.unflatten(4, (3, -1)).sum(4) if split else products


def bfloat16_parts(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors that add up to the float32 `a`: each has eight of its 24 bits."""
    high = a.bfloat16()
    rest = a - high
    middle = rest.bfloat16()
    return high, middle, (rest - middle).bfloat16()


def stacked_blocks(same: Iterable[Adapter], grid: int) -> tuple[Tensor, Tensor]:
    """A (L, g, g, q, n/g) and B (L, g, g, m/g, q) of one adapter of every layer."""
    a, b = zip(*(adapter.blocks(grid) for adapter in same), strict=True)
    return torch.stack(a), torch.stack(b)


def by_block(rows: Tensor, grid: int) -> Tensor:
    """Values of rows (L, m) in a shape that multiplies the rows of a grid of blocks (L, g, g, m/g, ·)."""
    return rows.view(len(rows), grid, 1, -1, 1)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of a and b, grids of blocks (L, g, g, m/g, ·), summed along whole rows: (L, m)."""
    return (a * b).sum((2, 4)).flatten(1)
