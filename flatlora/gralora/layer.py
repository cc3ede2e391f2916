"""GraLoRA: one low-rank adapter per block of the weight, so that the update's rank is k times that of LoRA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.blocks import AddBlocks, BlockOptions, add_blocks
from ..kernels.low_rank import add_low_rank, base_product, compute_dtype
from ..kernels.operators import is_tracing
from ..layers.adapter import block_factors
from ..layers.base import BaseWeight
from ..layers.bases import linear_base
from ..layers.bnb import hold_training_layout
from .targets import check_blocks, check_numbers


class GraLoRALinear(nn.Module):
    """A frozen linear layer whose weight (m, n) has a low-rank adapter in each of its k×k blocks.

    GraLoRA (arXiv:2505.20355, Section 3) adds to block row i, block column j

        ΔW_ij = s·B_ij·A_ij,    s = alpha / (r + hybrid_r)

    with ``A_ij`` (r/k, n/k) and ``B_ij`` (m/k, r/k). It costs what a LoRA of rank r does, its update has a rank of up
    to k·r, and an outlier among the inputs affects the adapters of its own block column alone. A hybrid has a plain
    LoRA of rank `hybrid_r` beside the blocks. `flatlora.reference.gralora_delta` is ΔW in a few lines.

    Parameters are named, shaped and initialised as PEFT's: ``gralora_A`` (k, n/k, r), Kaiming-uniform, ``gralora_B``
    (k, r, m/k), zero; of a hybrid ``gralora_A_general.weight`` (hybrid_r, n) and ``gralora_B_general.weight``
    (m, hybrid_r). They are float32, or float64 where the base is.

    Args:
        base: `nn.Linear`, `Conv1D`, or bitsandbytes' `Linear4bit` or `Linear8bitLt`. It is frozen and kept as it is.
        r: rank of the whole; each block has ``r / k``.
        k: blocks along each side of the weight. The paper takes 2 up to rank 32, and 4 from rank 64.
        alpha: numerator of the scaling.
        hybrid_r: rank of the plain LoRA beside the blocks.
        dropout: probability of dropping an element of the adapters' input while training.

    Raises:
        ValueError: r, m or n is not divisible by k; a number out of its range.
        TypeError: `base` is no such layer.
    """

    base_layer: Any
    gralora_A_general: Any
    gralora_B_general: Any

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int = 32,
        k: int = 4,
        alpha: float = 64,
        hybrid_r: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        r, k, alpha, hybrid_r, dropout = check_numbers(r, k, alpha, hybrid_r, dropout).values()
        weight = linear_base(base)
        if weight is None:
            raise TypeError(f"base must be nn.Linear, Conv1D, Linear4bit or Linear8bitLt, got {type(base).__name__}")
        m, n = weight.shape
        check_blocks({"base": base}, r, k)
        self.base_layer = base
        self.r, self.k, self.alpha, self.hybrid_r = r, k, alpha, hybrid_r
        self.scaling = alpha / (r + hybrid_r)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

        self._add_parameters(m, n)
        base.requires_grad_(False)
        self._layout = hold_training_layout(base)

    def _add_parameters(self, m: int, n: int) -> None:
        like: Any = self.base_layer.weight
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # Drawn from the CPU's global stream in PEFT's order, whatever the default device: one seed, one adapter.
        shape = self.r, n // self.k
        rows = [_kaiming(torch.empty(shape, dtype=torch.float32, device="cpu")) for _ in range(self.k)]
        self.gralora_A = nn.Parameter(torch.stack(rows).mT.contiguous().to(like.device, dtype))
        self.gralora_B = nn.Parameter(torch.zeros(self.k, self.r, m // self.k, device=like.device, dtype=dtype))
        self.gralora_A_general = self.gralora_B_general = None
        if self.hybrid_r:
            self.gralora_A_general = nn.Linear(n, self.hybrid_r, bias=False, dtype=torch.float32, device="cpu")
            self.gralora_B_general = nn.Linear(self.hybrid_r, m, bias=False, dtype=torch.float32, device="cpu")
            _kaiming(self.gralora_A_general.weight)
            nn.init.zeros_(self.gralora_B_general.weight)
            self.gralora_A_general.to(like.device, dtype)
            self.gralora_B_general.to(like.device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x·(W0 + ΔW)ᵀ + bias`` of shape (..., m) for x (..., n), in the dtype of the base's output."""
        if is_tracing() or (base := self.base).kind != "float" or not base.fusable(x):
            # Not in place: layers of other libraries may keep their output for backward, or return a view.
            return self.add_update(self.base_layer(x), x)
        if self._dropping:
            return self.add_update(base_product(x, base.float_weight(), self.base_layer.bias), x, in_place=True)
        return self.add_update(None, x)

    def add_update(self, out: Tensor | None, x: Tensor, in_place: bool = False) -> Tensor:
        """``out + x·ΔWᵀ`` for x (..., n) and out (..., m), in the dtype of `out`, written into `out` if `in_place`.

        Without `out` the base's output is computed too, which saves a temporary; for a float base without dropout.
        """
        dtype = compute_dtype(x, self.gralora_A.dtype)
        how, blocks = BlockOptions(self.scaling, dtype, in_place), (self.gralora_A, self.gralora_B)
        if is_tracing():  # plain operations, which the compiler fuses
            assert out is not None
            out = add_blocks(how, self._dropped(x), *blocks, out)
        else:
            base = (self.base.float_weight(), self.base_layer.bias) if out is None else (None, None)
            out = AddBlocks.apply(how, self._dropped(x), *blocks, out, *base)
        if self.gralora_A_general is None:
            return out
        A, B = self.gralora_A_general.weight, self.gralora_B_general.weight
        if is_tracing():
            update = self._dropped(x).to(dtype) @ A.to(dtype).t() @ B.to(dtype).t()
            return out + (self.scaling * update).to(out.dtype)
        return add_low_rank(out, self._dropped(x), True, dtype, (self.scaling,), A, B)

    def _dropped(self, x: Tensor) -> Tensor:
        """The input of one part of the adapter: blocks and hybrid have dropout masks of their own, as in PEFT."""
        return self.dropout(x.to(self.gralora_A.dtype)) if self._dropping else x

    @property
    def _dropping(self) -> bool:
        return self.training and isinstance(self.dropout, nn.Dropout)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW of shape (m, n), in the adapter's dtype."""
        A, B = block_factors(self.gralora_A, self.gralora_B)
        delta = (B @ A).transpose(1, 2).reshape(self.out_features, self.in_features)
        if self.gralora_A_general is not None:
            delta = delta + self.gralora_B_general.weight @ self.gralora_A_general.weight
        return delta * self.scaling

    @property
    def base(self) -> BaseWeight:
        base = linear_base(self.base_layer)
        assert base is not None
        return base

    # What models read off their linear layers.
    @property
    def in_features(self) -> int:
        return self.k * self.gralora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.k * self.gralora_B.shape[2]

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the update."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def extra_repr(self) -> str:
        hybrid = f", hybrid_r={self.hybrid_r}" if self.hybrid_r else ""
        return f"{self.in_features} -> {self.out_features}, r={self.r}, k={self.k}, alpha={self.alpha}{hybrid}"


def _kaiming(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
