"""One low-rank adapter of a layer, however it is stored, and what reads the adapters of one kind of layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import BaseWeight, full_tensor


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter, which adds ``scaling · B·A`` to the weight.

    Attributes:
        name: the adapter's name.
        A, B: (r, n) and (m, r). GraLoRA's are a grid of k×k blocks, `A` (k, k, r/k, n/k) and `B` (k, k, m/k, r/k), and
            add ``scaling · B_ij·A_ij`` to block row i, block column j.
        scaling: a number.
        magnitude: DoRA's, (m,).
        dropout: what acts on the adapter's input.
        A_param, B_param: the parameters that store A and B, maybe transposed.
        grad_scale: what the gradients of A and B are multiplied by.
        shared: whether other layers add A, and B, too. Their gradients are then sums over these layers.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    dropout: nn.Module | None = None
    A_param: nn.Parameter | None = None
    B_param: nn.Parameter | None = None
    grad_scale: float = 1.0
    shared: tuple[bool, bool] = (False, False)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that store A and B."""
        return [param for param in (self.A_param, self.B_param) if param is not None]

    @property
    def trained(self) -> bool:
        """Whether A or B requires a gradient."""
        return any(param.requires_grad for param in self.params)

    @property
    def has_grads(self) -> bool:
        """Whether A or B has a gradient of this layer alone, and neither lacks one that it requires."""
        return any(self.has_own_grads) and all(p.grad is not None or not p.requires_grad for p in self.params)

    @property
    def has_own_grads(self) -> tuple[bool, bool]:
        """Whether A, and B, has a gradient that is this layer's alone."""
        A, B = self.A_param, self.B_param
        if A is None or B is None:
            return False, False
        return A.grad is not None and not self.shared[0], B.grad is not None and not self.shared[1]

    def grads(self) -> tuple[Tensor, Tensor]:
        """(∂L/∂A, ∂L/∂B) in the shapes of A and B; zero for a frozen one."""
        grad_a, grad_b = (full_tensor(torch.zeros_like(p) if p.grad is None else p.grad) for p in self.params)
        if self.A.dim() == 4:
            return block_factors(grad_a, grad_b)
        return (
            grad_a if grad_a.shape == self.A.shape else grad_a.t(),
            grad_b if grad_b.shape == self.B.shape else grad_b.t(),
        )

    @property
    def k(self) -> int:
        """Blocks along each side of the weight: 1 for all but GraLoRA."""
        return self.A.shape[0] if self.A.dim() == 4 else 1

    @property
    def rank(self) -> int:
        return self.A.shape[-2] * self.k

    def blocks(self, k: int) -> tuple[Tensor, Tensor]:
        """A (k, k, q, n/k) and B (k, k, m/k, q) of every block of a k×k grid; k is a multiple of the adapter's own."""
        A, B = (full_tensor(factor)[(None,) * (4 - factor.dim())] for factor in (self.A, self.B))
        pieces = k // self.k
        if pieces == 1:
            return A, B
        A = A.unflatten(3, (pieces, -1)).movedim(3, 2).flatten(1, 2)
        B = B.unflatten(2, (pieces, -1)).movedim(2, 1).flatten(0, 1)
        return A.repeat_interleave(pieces, 0), B.repeat_interleave(pieces, 1)


def block_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Views of GraLoRA's factors by block: A (k, n/k, r) as (k, k, r/k, n/k), B (k, r, m/k) as (k, k, m/k, r/k).

    [i, j] is the block in block row i and block column j. The stored A has one matrix per block column, with r/k
    columns for each block row; the stored B has one per block row, with r/k rows for each block column.
    """
    k = A.shape[0]
    return A.unflatten(2, (k, -1)).permute(2, 0, 3, 1), B.unflatten(1, (k, -1)).transpose(2, 3)


def stored_blocks(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `block_factors`: A (k, n/k, r) and B (k, r, m/k)."""
    return A.permute(1, 3, 0, 2).flatten(2), B.transpose(2, 3).flatten(1, 2)


class NotLinear(Exception):
    """The layer's adapters are not low-rank updates of a linear layer's weight, so it is left out. Says why."""


class Reader(ABC):
    """Reads one kind of adapter layer. Every method answers for the module as it is at present."""

    is_peft = False

    @abstractmethod
    def reads(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    def of(self, module: Any) -> Reader:
        """The reader of this one layer, where layers of the kind differ; the methods below are called on it.

        `NotLinear` if its adapters are of another kind; ValueError if it computes something else than it should.
        """
        return self

    def parts(self, module: Any) -> Iterable[nn.Module]:
        """Children that belong to this layer but would be taken for adapter layers."""
        return ()

    def names(self, module: Any) -> Iterable[str]:
        """The adapters that the module holds."""
        return ("default",)

    @abstractmethod
    def base(self, module: Any) -> BaseWeight:
        """The weight that they adapt. Raises `NotLinear` where it is not a linear layer's."""

    @abstractmethod
    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        """The low-rank adapters that the one of that name consists of, over a weight (m, n); [] if there is none."""

    def enabled(self, module: Any) -> bool:
        """Whether the module adds its adapters at all."""
        return True

    def active(self, module: Any) -> Sequence[str]:
        """Names of the adapters that the module adds while it is enabled and they are not merged."""
        return ("default",)

    def merged(self, module: Any) -> Sequence[str]:
        """Names of the adapters that are folded into the base weight."""
        return ()
