"""The frozen weight of a linear layer, read without caring how it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BaseWeight", "keep_training_layout", "linear_base", "release_layout"]

_BLOCK = 1 << 18  # elements of a base weight that are upcast at a time
_REPACKS = "support_avx512bf16_for_cpu"
_QUANTISED = {"Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt"}


def wide(device: torch.device) -> torch.dtype:
    """The dtype for small sums and r×r algebra: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def whole(tensor: Tensor) -> Tensor:
    """The full tensor behind a sharded one (FSDP2, tensor parallel); any other tensor as it is."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


class BaseWeight:
    """A frozen linear layer's weight ``W0`` of shape (m, n) = (out_features, in_features), however it is stored.

    `kind` is ``"float"``, ``"4bit"`` or ``"8bit"`` (bitsandbytes), or ``"opaque"`` for a base that can only be applied.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, int], transposed: bool):
        self.module: Any = module
        self.shape = shape
        self.transposed = transposed

    @property
    def kind(self) -> str:
        weight = getattr(self.module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            return "4bit"
        if not isinstance(weight, Tensor):
            return "opaque"
        if weight.dtype == torch.int8 and hasattr(self.module, "state"):
            return "8bit"
        plain = weight.is_floating_point() and weight.dim() == 2
        # Quantisers that pose as a float tensor of the right shape (torchao) are tensor subclasses of their own.
        known = type(weight).__module__.startswith(("torch.", "bitsandbytes.")) or type(weight) is Tensor
        return "float" if plain and known else "opaque"

    @property
    def plain(self) -> bool:
        """Whether the module computes ``x·W0ᵀ + bias`` and nothing else, as far as its class tells."""
        cls = type(self.module)
        if self.kind == "float":
            return cls.forward is nn.Linear.forward or (
                cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
            )
        return cls.__name__ in _QUANTISED and cls.__module__.startswith("bitsandbytes.")

    @property
    def trainable(self) -> bool:
        weight = getattr(self.module, "weight", None)
        return isinstance(weight, Tensor) and weight.requires_grad

    def float_weight(self) -> Tensor:
        """The stored float weight as (m, n), a view for transposed storage; only for `kind` ``"float"``."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.t() if self.transposed else weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A dequantised (m, n) copy in `dtype`; only for `kind` ``"4bit"`` and ``"8bit"``."""
        weight: Any = self.module.weight
        if self.kind == "4bit":
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        scale = self._int8_scale()
        return weight.data.to(dtype).mul_(scale.to(dtype).unsqueeze(1))

    def _int8_scale(self) -> Tensor:
        # bitsandbytes moves the row scales from the weight to the layer's state on the first forward.
        state = self.module.state
        scale = state.SCB if getattr(state, "SCB", None) is not None else self.module.weight.SCB
        return scale.float() / 127

    def _row_blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Consecutive blocks of rows in `dtype`, none larger than a fixed number of elements."""
        m, n = self.shape
        rows = max(1, _BLOCK // n)
        if self.kind == "float":
            weight = whole(self.float_weight().detach())
            for i in range(0, m, rows):
                yield weight[i : i + rows].to(dtype)
        elif self.kind == "8bit":
            codes, scale = self.module.weight.data, self._int8_scale()
            for i in range(0, m, rows):
                yield codes[i : i + rows].to(dtype) * scale[i : i + rows, None].to(dtype)
        else:
            weight = self.dense(torch.float32)
            for i in range(0, m, rows):
                yield weight[i : i + rows].to(dtype)

    def row_sq(self) -> Tensor:
        """``‖W0_i‖²``, shape (m,)."""
        dtype = wide(self.device)
        if self.kind != "opaque":
            return torch.cat([block.square().sum(1) for block in self._row_blocks(dtype)])
        n = self.shape[1]  # the columns of W0 are what the layer makes of the unit vectors
        total = torch.zeros(self.shape[0], dtype=dtype, device=self.device)
        for i in range(0, n, 128):
            units = torch.zeros(min(128, n - i), n, device=self.device)
            units[:, i:].fill_diagonal_(1.0)
            total += self.apply_rows(units).to(dtype).square().sum(1)
        return total

    def apply_rows(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        """``W0·xᵀ`` of shape (m, r) for the rows of x (r, n), without the bias and without an (m, n) temporary.

        With `columns`, x has as many and it is ``W0[:, columns]·xᵀ``.
        """
        if self.kind == "float":
            weight = whole(self.float_weight().detach())
            if weight.dtype == x.dtype:
                return weight[:, columns] @ x.t()
        if self.kind in ("float", "8bit"):
            return torch.cat([block[:, columns] @ x.t() for block in self._row_blocks(x.dtype)])
        if x.shape[1] < self.shape[1]:
            padded = x.new_zeros(x.shape[0], self.shape[1])
            padded[:, columns] = x
            x = padded
        if self.kind == "4bit":
            from bitsandbytes import matmul_4bit

            # Not module(x): that would round x to the layer's compute dtype.
            return matmul_4bit(x, self.module.weight.data, quant_state=self.module.weight.quant_state).t()
        # The layer is affine and nothing more is known of it: its answer to zero is the bias.
        tensors = (*self.module.parameters(), *self.module.buffers())
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), x.dtype)
        y = self.module(torch.cat([x, x.new_zeros(1, x.shape[1])]).to(dtype))
        return (y[:-1] - y[-1:]).t().to(x.dtype)

    def apply_blocks(self, x: Tensor) -> Tensor:
        """``W0_ij·X_ijᵀ`` of shape (k, k, m/k, r) for a grid of k×k blocks X_ij, shape (k, k, r, n/k)."""
        k, _, r, width = x.shape
        if k == 1:
            return self.apply_rows(x[0, 0])[None, None]
        parts = []
        for j in range(k):
            crossed = self.apply_rows(x[:, j].flatten(0, 1), slice(j * width, (j + 1) * width))
            # Block row i needs its own r of the k·r products alone.
            parts.append(crossed.reshape(k, -1, k, r).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        return torch.stack(parts, 1)

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.module.parameters())


def linear_base(module: Any) -> BaseWeight | None:
    """The weight of an `nn.Linear`, one derived from it, or a `Conv1D`; None for any other module."""
    if type(module).__name__ == "Conv1D":
        n, m = module.weight.shape
        return BaseWeight(module, (m, n), transposed=True)
    # Attention reads the weight of the one left out and never calls it.
    if not isinstance(module, nn.Linear) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return None
    return BaseWeight(module, (module.out_features, module.in_features), transposed=False)


def keep_training_layout(model: nn.Module) -> list[nn.Module]:
    """Keeps bitsandbytes from repacking the 4-bit weights of `model` on the CPU; returns the modules it holds so.

    On a CPU with AVX512-BF16, the first forward in eval mode repacks a `Linear4bit` for inference and never undoes it:
    from then on the layer passes no gradient and its weight dequantises to something else. A model that is evaluated
    in between would train on silently broken.
    """
    held = [module for module in model.modules() if getattr(module, _REPACKS, False)]
    for module in held:
        setattr(module, _REPACKS, False)
    return held


def release_layout(held: list[nn.Module]) -> None:
    """Undoes `keep_training_layout`."""
    while held:
        setattr(held.pop(), _REPACKS, True)
