"""BiDoRA's orthogonality term: its gradient, without autograd and without an (n, n) matrix where m < n."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.adapter import Adapter
from ..layers.stack import chunks, stacks
from ..layers.view import LoRALayer


@torch.no_grad()
def add_orthogonality_gradient(layers: list[LoRALayer], gamma: float) -> None:
    """Adds ``γ·∂R/∂A`` and ``γ·∂R/∂B`` to the `.grad` of the adapters that have one; nothing where γ is 0.

    ``R = mean ‖DᵀD − I‖_F`` over these, D (m, n) being ``W0 + s·B·A`` with columns of norm one (BiDoRA,
    arXiv:2410.09758, Eq. 5). A column that is zero is left out. Costs ⅝ of a product of ``m·n·min(m, n)`` per layer,
    twice that where m < n, and reads (dequantises) each base weight once. Layers of one form are computed together, as
    many as have a bounded size.
    """
    if gamma == 0:
        return
    known = {layer.name: [adapter for adapter in layer.all_adapters() if adapter.has_grads] for layer in layers}
    count = sum(map(len, known.values()))
    for stack in stacks([layer for layer in layers if known[layer.name]], known):
        (m, n), device = stack.layers[0].shape, stack.layers[0].base.device
        for same in stack.columns():
            for part in chunks(list(zip(stack.layers, same, strict=True)), m * n, device):
                _add_gradients(part, gamma / count)


def _add_gradients(part: list[tuple[LoRALayer, Adapter]], factor: float) -> None:
    """Adds `factor` times the gradients of these layers' terms, whose adapters are of one form."""
    layers, adapters = zip(*part, strict=True)
    dtype, s = torch.promote_types(adapters[0].A.dtype, torch.float32), adapters[0].scaling
    A, B = (torch.stack(same).to(dtype) for same in zip(*((a.A, a.B) for a in adapters), strict=True))
    W = torch.stack([layer.base.dense(dtype) for layer in layers]).baddbmm_(B, A, alpha=s)
    for terms, grads in zip(_gradients(W, A, B), zip(*(a.grads() for a in adapters), strict=True), strict=True):
        torch._foreach_add_(grads, terms.to(grads[0].dtype).unbind(), alpha=factor * s)


def _gradients(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``Bᵀ·∂f/∂W`` (L, r, n) and ``∂f/∂W·Aᵀ`` (L, m, r) of ``f = ‖DᵀD − I‖_F`` in L layers; W (L, m, n) becomes D.

    With ``D = W·N``, ``N = diag(1/‖w_j‖)`` and ``c_j = ‖(DᵀD − I)_j‖²``, which add up to f²,

        ∂f/∂W = 2/f · D·(DᵀD − I − diag(c))·N

    Where m < n, ``D·DᵀD`` enters as ``(D·Dᵀ)·D``.
    """
    m, n = W.shape[1:]
    tiny = torch.finfo(W.dtype).tiny
    norm = W.norm(dim=1, keepdim=True).clamp_(min=tiny)
    D, AN = W.div_(norm), A / norm
    if m < n:
        gram = _gram(D)
        squares = _quadratic(gram, D)
        c = squares - 1
        left = (B.mT @ gram) @ D - (B.mT @ D) * squares
        right = gram @ (D @ AN.mT) - D @ (AN * squares).mT
    else:
        excess = _gram(D.mT)
        diagonal = excess.diagonal(dim1=1, dim2=2).zero_()  # exactly one less one, but for rounding
        c = excess.square().sum(1, keepdim=True)
        diagonal.sub_(c[:, 0])
        left, right = (B.mT @ D) @ excess, D @ (excess @ AN.mT)
    scale = 2 / c.sum(2, keepdim=True).clamp_(min=tiny).sqrt_()
    return left / norm * scale, right * scale


def _gram(X: Tensor) -> Tensor:
    """``X·Xᵀ``, its lower triangle copied from the upper: ⅝ of the work of the plain product where that is large."""
    size = X.shape[1]
    gram = X.new_empty(len(X), size, size)
    for start, end in _blocks(size):
        gram[:, start:end, start:] = X[:, start:end] @ X[:, start:].mT
        gram[:, end:, start:end] = gram[:, start:end, end:].mT
    return gram


def _quadratic(S: Tensor, X: Tensor) -> Tensor:
    """``x_jᵀ·S·x_j`` (L, 1, n) of the columns of X for a symmetric S, of which the upper triangle is read."""
    total = X.new_zeros(len(X), 1, X.shape[2])
    for start, end in _blocks(X.shape[1]):
        rows = S[:, start:end, start:].clone()
        rows[:, :, end - start :].mul_(2)  # stands for the mirrored block below the diagonal too
        total += (X[:, start:end] * (rows @ X[:, start:])).sum(1, keepdim=True)
    return total


def _blocks(size: int) -> list[tuple[int, int]]:
    """Four parts of rows, or all of few, where launching more products costs what they save."""
    step = size if size < 256 else -(-size // 4)
    return [(start, min(start + step, size)) for start in range(0, size, step)]
