"""BiDoRA's orthogonality term and its gradient, without autograd and without an (n, n) matrix where m < n."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.adapter import Adapter
from ..layers.base import BaseWeight, full_tensor
from ..layers.view import LoRALayer

__all__ = ["add_orthogonality_gradient"]


@torch.no_grad()
def add_orthogonality_gradient(layers: list[LoRALayer], gamma: float) -> None:
    """Adds ``γ·∂R/∂A`` and ``γ·∂R/∂B`` to the `.grad` of the adapters that have one.

    ``R = mean ‖DᵀD − I‖_F`` over these, D (m, n) being ``W0 + s·B·A`` with columns of norm one (BiDoRA,
    arXiv:2410.09758, Eq. 5). A column that is zero is left out. Costs a bit more than half a product of
    ``m·n·min(m, n)`` per layer, twice that where m < n, and reads (dequantises) each base weight once.
    """
    adapters = [(layer, adapter) for layer in layers for adapter in layer.all_adapters() if adapter.has_grads]
    for layer, adapter in adapters:
        for grad, term in zip(adapter.grads(), _layer_gradient(layer.base, adapter), strict=True):
            grad.add_(term.to(grad.dtype), alpha=gamma / len(adapters))


def _layer_gradient(base: BaseWeight, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """``∂f/∂A`` (r, n) and ``∂f/∂B`` (m, r) of one layer's ``f = ‖DᵀD − I‖_F``.

    With ``D = W·N``, ``N = diag(1/‖w_j‖)`` and ``c_j = ‖(DᵀD − I)_j‖²``, which add up to f², the gradient is

        ∂f/∂W = 2/f · D·(DᵀD − I − diag(c))·N

    It is wanted only in ``s·Bᵀ·∂f/∂W`` and ``s·∂f/∂W·Aᵀ``. Where m < n, ``D·DᵀD`` enters as ``(D·Dᵀ)·D``.
    """
    dtype = torch.promote_types(adapter.A.dtype, torch.float32)
    A, B, s = full_tensor(adapter.A).detach().to(dtype), full_tensor(adapter.B).detach().to(dtype), adapter.scaling
    D = torch.addmm(base.dense(dtype), B, A, alpha=s)
    norm = D.norm(dim=0).clamp_(min=torch.finfo(dtype).tiny)
    D /= norm
    m, n = D.shape
    if m < n:
        gram = _gram(D)
        c = _quadratic(gram, D) - 1
        left = (B.t() @ gram) @ D - (B.t() @ D) * (c + 1)
        right = gram @ (D @ (A / norm).t()) - D @ (A / norm * (c + 1)).t()
    else:
        excess = _gram(D.t())
        excess.fill_diagonal_(0)  # exactly one, but for rounding
        c = excess.square().sum(1)
        excess.diagonal().sub_(c)
        left, right = (B.t() @ D) @ excess, D @ (excess @ (A / norm).t())
    f = c.sum().clamp_(min=torch.finfo(dtype).tiny).sqrt_()
    return left / norm * (2 * s / f), right * (2 * s / f)


def _gram(X: Tensor) -> Tensor:
    """``X·Xᵀ``, its lower triangle copied from the upper: little more than half the work of the plain product."""
    size = X.shape[0]
    gram = X.new_empty(size, size)
    for start, end in _blocks(size):
        gram[start:end, start:] = X[start:end] @ X[start:].t()
        gram[end:, start:end] = gram[start:end, end:].t()
    return gram


def _quadratic(S: Tensor, X: Tensor) -> Tensor:
    """``x_jᵀ·S·x_j`` of the columns of X (m, n) for a symmetric S (m, m), of which the upper triangle is read."""
    total = X.new_zeros(X.shape[1])
    for start, end in _blocks(X.shape[0]):
        rows = S[start:end, start:].clone()
        rows[:, end - start :].mul_(2)  # stands for the mirrored block below the diagonal too
        total += (X[start:end] * (rows @ X[start:])).sum(0)
    return total


def _blocks(size: int, count: int = 8) -> list[tuple[int, int]]:
    step = -(-size // count)
    return [(start, min(start + step, size)) for start in range(0, size, step)]
