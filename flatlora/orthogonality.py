"""BiDoRA's orthogonality term and its gradient, without autograd and without an (n, n) matrix where m < n."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Adapter, BaseWeight, LoRALayer, whole

__all__ = ["add_orthogonality_gradient", "orthogonality"]


@torch.no_grad()
def orthogonality(layers: list[LoRALayer]) -> Tensor:
    """``R = mean ‖DᵀD − I‖_F`` over the layers' adapters, D (m, n) being ``W0 + s·B·A`` with columns of norm one.

    BiDoRA, arXiv:2410.09758, Eq. 5. A column that is zero is left out.
    """
    return torch.stack([_layer_term(layer.base, adapter)[0] for layer, adapter in _adapters(layers)]).mean()


@torch.no_grad()
def add_orthogonality_gradient(layers: list[LoRALayer], gamma: float) -> None:
    """Adds ``γ·∂R/∂A`` and ``γ·∂R/∂B`` to the `.grad` of the adapters that have one.

    Costs one product of ``m·n·min(m, n)`` per layer, two where m < n, and reads (dequantises) each base weight once.
    """
    adapters = [(layer, adapter) for layer, adapter in _adapters(layers) if adapter.grads() is not None]
    for layer, adapter in adapters:
        grads = adapter.grads()
        assert grads is not None
        for grad, term in zip(grads, _layer_term(layer.base, adapter)[1:], strict=True):
            grad.add_(term.to(grad.dtype), alpha=gamma / len(adapters))


def _adapters(layers: list[LoRALayer]) -> list[tuple[LoRALayer, Adapter]]:
    return [(layer, adapter) for layer in layers for adapter in layer.all_adapters()]


def _layer_term(base: BaseWeight, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """``f = ‖DᵀD − I‖_F`` of one layer, ``∂f/∂A`` (r, n) and ``∂f/∂B`` (m, r).

    With ``D = W·N``, ``N = diag(1/‖w_j‖)`` and ``c_j = ‖(DᵀD − I)_j‖²``, which add up to f², the gradient is

        ∂f/∂W = 2/f · D·(DᵀD − I − diag(c))·N

    It is wanted only in ``s·Bᵀ·∂f/∂W`` and ``s·∂f/∂W·Aᵀ``. Where m < n, ``D·DᵀD`` is computed as ``(D·Dᵀ)·D``.
    """
    dtype = torch.promote_types(adapter.A.dtype, torch.float32)
    A, B, s = whole(adapter.A).detach().to(dtype), whole(adapter.B).detach().to(dtype), adapter.scaling
    D = torch.addmm(_dense(base, dtype), B, A, alpha=s)
    norm = D.norm(dim=0).clamp_(min=torch.finfo(dtype).tiny)
    D /= norm
    m, n = D.shape
    if m < n:
        excess = (D @ D.t()) @ D  # D·DᵀD
        c = (D * excess).sum(0) - 1
        excess.addcmul_(D, c + 1, value=-1)
        left, right = B.t() @ excess, excess @ (A / norm).t()
    else:
        excess = D.t() @ D
        excess.fill_diagonal_(0)  # exactly one, but for rounding
        c = excess.square().sum(1)
        excess.diagonal().sub_(c)
        left, right = (B.t() @ D) @ excess, D @ (excess @ (A / norm).t())
    f = c.sum().clamp_(min=torch.finfo(dtype).tiny).sqrt_()
    return f, left / norm * (2 * s / f), right * (2 * s / f)


def _dense(base: BaseWeight, dtype: torch.dtype) -> Tensor:
    """W0 (m, n) in `dtype`; not a copy where it is stored so."""
    if base.kind == "float":
        return whole(base.float_weight().detach()).to(dtype)
    if base.kind == "opaque":
        return base.apply_rows(torch.eye(base.shape[1], dtype=dtype, device=base.device))
    return base.dense(dtype)
