"""One low-rank adapter of a layer, however it is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import full_tensor

__all__ = ["Adapter", "block_factors", "stored_blocks"]


@dataclass(frozen=True)
class Adapter:
    """One active low-rank adapter of a layer: it adds ``scaling · B·A`` to the weight.

    `A` is (r, n), `B` is (m, r); the parameters behind them may be stored the other way around. GraLoRA's are a grid of
    k×k blocks, `A` (k, k, r/k, n/k) and `B` (k, k, m/k, r/k), and add ``scaling · B_ij·A_ij`` to block row i, column j.
    `magnitude` is DoRA's (m,) vector or None. `dropout` acts on the adapter's input. `grad_scale` is what the gradients
    of A and B are multiplied by. `shared` says of A and B whether other layers add them too, so that their gradients
    are sums over these layers.
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
    def trained(self) -> bool:
        """Whether a gradient is asked of A or B."""
        return any(param is not None and param.requires_grad for param in (self.A_param, self.B_param))

    @property
    def has_grads(self) -> bool:
        """Whether A and B have gradients, one of them at least, as one may be frozen: LoRA-FA's A is."""
        factors = [param for param in (self.A_param, self.B_param) if param is not None]
        return any(self.told) and all(param.grad is not None or not param.requires_grad for param in factors)

    @property
    def told(self) -> tuple[bool, bool]:
        """Whether the gradient of A, and that of B, is there and this layer's own."""
        A, B = self.A_param, self.B_param
        if A is None or B is None:
            return False, False
        return A.grad is not None and not self.shared[0], B.grad is not None and not self.shared[1]

    def grads(self) -> tuple[Tensor, Tensor]:
        """(∂L/∂A, ∂L/∂B) in the shapes of A and B; zero for a frozen one."""
        assert self.A_param is not None and self.B_param is not None
        params = self.A_param, self.B_param
        grad_a, grad_b = (full_tensor(torch.zeros_like(p) if p.grad is None else p.grad) for p in params)
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
    """GraLoRA's factors block by block, as views: A (k, n/k, r) as (k, k, r/k, n/k), B (k, r, m/k) as (k, k, m/k, r/k).

    [i, j] is the block in block row i and block column j. Stored, A has one matrix per block column, whose r columns
    belong to the block rows in turn; B has one per block row, whose r rows belong to the block columns in turn.
    """
    k = A.shape[0]
    return A.unflatten(2, (k, -1)).permute(2, 0, 3, 1), B.unflatten(1, (k, -1)).transpose(2, 3)


def stored_blocks(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """`block_factors` undone: A (k, n/k, r) and B (k, r, m/k), which a product takes."""
    return A.permute(1, 3, 0, 2).flatten(2), B.transpose(2, 3).flatten(1, 2)
