"""Measuring how flat the minimum is that a fine-tuned model sits in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .ggpo import RowNoise
from .layers import keep_training_layout, lora_layers, release_layout
from .perturbation import Perturbation

__all__ = ["NoiseRise", "noise_rise", "weight_noise"]


@contextmanager
def weight_noise(
    model: nn.Module, sigma: float, *, seed: int = 0, adapter: str | Iterable[str] | None = None
) -> Iterator[RowNoise]:
    """Within the context every adapted layer computes at ``W' + ε``, in eval mode too; no weight is written to.

    Row i of ε is drawn from ``N(0, σ²/n · ‖W'_i‖² · I)``: its expected norm is σ times the row's. The same ε holds
    until the `step` of the object that the context yields is changed.

    Args:
        model: a model with adapters; a `GGPOOptimizer` may be on it.
        sigma: σ, relative to each row's norm.
        seed: of the private generator.
        adapter: name or names of the adapters whose layers are perturbed; None for all.

    Raises:
        ValueError: no adapted layer, an unknown adapter.
    """
    noise = RowNoise(lora_layers(model, adapter), sigma, 0.0, "gaussian", 0, seed, everywhere=True)
    perturbations = [Perturbation(rows.layer, noise) for rows in noise.rows.values()]
    held = keep_training_layout(model)
    for perturbation in perturbations:
        perturbation.attach()
    try:
        yield noise
    finally:
        for perturbation in perturbations:
            perturbation.remove()
        release_layout(held)


@dataclass(frozen=True)
class NoiseRise:
    """Mean loss without noise, mean rise of it under noise, and the standard error of that mean over the draws."""

    loss: float
    rise: float
    error: float


@torch.no_grad()
def noise_rise(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    sigma: float = 0.03,
    draws: int = 8,
    seed: int = 0,
    adapter: str | Iterable[str] | None = None,
) -> NoiseRise:
    """How much the mean loss over `batches` rises under random weight noise: the smaller, the flatter.

    Every draw is one ε for all batches. The model is measured in eval mode and left in the mode it was found in.

    Args:
        model: a model with adapters.
        loss_fn: ``loss_fn(model, batch)`` returns the batch's mean loss as a scalar tensor.
        batches: any re-iterable of batches, counted equally.
        sigma: σ, noise relative to the norm of each row of ``W'``.
        draws: number of ε drawn.
        seed: of the private generator; equal seeds give models of the same shape the same standard normals.
        adapter: as in `weight_noise`.

    Raises:
        ValueError: no draws, no batches, no adapted layer.
    """
    batches = list(batches)
    if draws < 1 or not batches:
        raise ValueError(f"need at least one draw and one batch, got draws={draws} and {len(batches)} batches")

    def mean_loss() -> float:
        return sum(float(loss_fn(model, batch)) for batch in batches) / len(batches)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with weight_noise(model, 0.0, adapter=adapter):
            clean = mean_loss()
        rises = []
        with weight_noise(model, sigma, seed=seed, adapter=adapter) as noise:
            for noise.step in range(draws):
                rises.append(mean_loss() - clean)
    finally:
        for module, mode in modes:
            module.training = mode
    spread = torch.tensor(rises, dtype=torch.float64)
    error = float(spread.std()) / draws**0.5 if draws > 1 else float("nan")
    return NoiseRise(clean, float(spread.mean()), error)
