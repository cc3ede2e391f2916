"""Every method as its equations stand: dense, slow, without the rest of the library. Read this first.

A layer has a frozen ``W0`` (m, n), factors ``A`` (r, n) and ``B`` (m, r), and a scaling s. ``loss`` is a function of
the list of the layers' effective weights. The tests compare the library with these functions, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[Sequence[Tensor]], Tensor]
Layer = tuple[Tensor, Tensor, Tensor, float]  # W0, A, B, s
Pairs = list[tuple[Tensor, Tensor]]  # A, B


def lora(W0: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W' of LoRA."""
    return W0 + s * B @ A


def dora(W0: Tensor, A: Tensor, B: Tensor, s: float, mu: Tensor, norm_moves: bool = False) -> Tensor:
    """W' of DoRA, whose norm is a constant in backward unless `norm_moves`."""
    V = lora(W0, A, B, s)
    norm = V.norm(dim=1) if norm_moves else V.detach().norm(dim=1)
    return (mu / norm)[:, None] * V


# --- GGPO (arXiv:2502.14538, Eq. 6-8) -----------------------------------------------------------------------------


def ggpo_std(weight: Tensor, sigma: float, beta: float = 0.0, grad: Tensor | None = None) -> Tensor:
    """Standard deviation of each row of ε, per element: σ/√n · sqrt(‖W'_i‖² + β‖G_i‖²)."""
    row_sq = weight.square().sum(1)
    if grad is not None:
        row_sq = row_sq + beta * grad.square().sum(1)
    return sigma * (row_sq / weight.shape[1]).sqrt()


def projected(grad: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """G on the tangent space {B·X + Y·A}: P_B·G + G·P_A − P_B·G·P_A, with pseudo-inverses."""
    P_B = B @ torch.linalg.pinv(B, rtol=1e-9)
    P_A = torch.linalg.pinv(A, rtol=1e-9) @ A
    return P_B @ grad + grad @ P_A - P_B @ grad @ P_A


def ggpo_step(loss: Loss, layers: list[Layer], eps: list[Tensor], lr: float) -> tuple[Pairs, tuple[Tensor, ...]]:
    """One SGD step on A and B with the gradients at W' + ε: the new (A, B), and each layer's G there.

    LoRASAM's step is the same, with another ε.
    """
    weights = [lora(*layer).requires_grad_() for layer in layers]
    G = torch.autograd.grad(loss([W + e for W, e in zip(weights, eps, strict=True)]), weights)
    new = [(A - lr * s * B.t() @ g, B - lr * s * g @ A.t()) for (_, A, B, s), g in zip(layers, G, strict=True)]
    return new, G


# --- LoRASAM --------------------------------------------------------------------------------------------------------


def lorasam_perturbation(grads: Sequence[Tensor], layers: list[Layer], rho: float) -> list[Tensor]:
    """ε of the next step from each layer's G in this one: ρ·P(G), of norm ρ over all layers."""
    tangent = [projected(G, B, A) for G, (_, A, B, _) in zip(grads, layers, strict=True)]
    norm = torch.stack([T.square().sum() for T in tangent]).sum().sqrt()
    return [rho * T / norm for T in tangent]


def lorasam_radius(rises: Sequence[float], target: float) -> float:
    """ρ where `target` chooses it, after steps in which ε raised the loss by `rises`."""
    rho, mean = 0.005, 0.0
    for i, rise in enumerate(rises):
        bounded = min(100 * target, max(-100 * target, rise))
        mean += max(0.1, 1 / (i + 1)) * (bounded - mean)
        rho *= math.exp(0.1 * min(1.0, max(-1.0, 1 - mean / target)))
        rho = min(0.3, max(1e-4, rho))
    return rho


# --- Bi-LoRA (arXiv:2508.19564, Eq. 7-9) --------------------------------------------------------------------------


def bilora_step(
    loss: Loss, layers: list[Layer], auxiliary: list[tuple[Tensor, Tensor, float]], lr: float, rho: float
) -> tuple[Pairs, Pairs]:
    """One SGD step: the primaries descend, the auxiliaries ascend and are clipped together. The new (A, B) of each."""
    weights = [lora(*layer) + s2 * B2 @ A2 for layer, (A2, B2, s2) in zip(layers, auxiliary, strict=True)]
    weights = [W.requires_grad_() for W in weights]
    G = torch.autograd.grad(loss(weights), weights)
    primary = [(A - lr * s * B.t() @ g, B - lr * s * g @ A.t()) for (_, A, B, s), g in zip(layers, G, strict=True)]
    ascended = [(A + lr * s * B.t() @ g, B + lr * s * g @ A.t(), s) for (A, B, s), g in zip(auxiliary, G, strict=True)]
    c = torch.stack([(s * B @ A).square().sum() for A, B, s in ascended]).sum().sqrt()
    factor = (rho / c).sqrt() if c > rho else 1.0
    return primary, [(A * factor, B * factor) for A, B, _ in ascended]


# --- BiDoRA (arXiv:2410.09758, Eq. 6-9) ---------------------------------------------------------------------------


def bidora_hypergradient(
    train: Callable[..., Tensor], val: Callable[..., Tensor], V: list[Tensor], mu: list[Tensor], xi: float
) -> list[Tensor]:
    """∂_μ L_val(V', μ) − ξ·∇²_{μV} L_tr(V, μ)·v with V' = V − ξ·∇_V L_tr and v = ∇_V L_val(V', μ), by autograd.

    The losses are called as ``train(V, mu, norm_moves=...)``: DoRA's norm is a constant in both ∇_V and moves with V in
    the mixed derivative.
    """
    V = [v.detach().requires_grad_() for v in V]
    mu = [m.detach().requires_grad_() for m in mu]
    inner = torch.autograd.grad(train(V, mu), V)
    there = [(v - xi * g).detach().requires_grad_() for v, g in zip(V, inner, strict=True)]
    grads = torch.autograd.grad(val(there, mu), [*mu, *there])
    direct, v = grads[: len(mu)], grads[len(mu) :]
    along = torch.autograd.grad(train(V, mu, norm_moves=True), V, create_graph=True)
    mixed = torch.autograd.grad(along, mu, grad_outputs=v)
    return [d - xi * m for d, m in zip(direct, mixed, strict=True)]


def orthogonality(weights: Sequence[Tensor]) -> Tensor:
    """R, the mean over the layers of ‖DᵀD − I‖_F, D the column-normalised ``W0 + s·B·A``."""
    terms = []
    for W in weights:
        D = W / W.norm(dim=0)
        terms.append((D.t() @ D - torch.eye(W.shape[1], dtype=W.dtype, device=W.device)).norm())
    return torch.stack(terms).mean()


# --- GraLoRA (arXiv:2505.20355, Section 3) ------------------------------------------------------------------------


def gralora_delta(A: Tensor, B: Tensor, s: float) -> Tensor:
    """ΔW (m, n) from PEFT's parameters A (k, n/k, r) and B (k, r, m/k): block (i, j) is s·B_ij·A_ij.

    Block column j projects its inputs on r numbers, k groups of r/k; group i of them feeds block row i, whose B takes
    them from the r/k rows that belong to column j.
    """
    k, _, r = A.shape
    g = r // k
    rows = []
    for i in range(k):
        row = [B[i, j * g : (j + 1) * g].t() @ A[j, :, i * g : (i + 1) * g].t() for j in range(k)]
        rows.append(torch.cat(row, 1))
    return s * torch.cat(rows, 0)
