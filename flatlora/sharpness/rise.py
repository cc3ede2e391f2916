"""How much the loss rises when the weights are moved: by noise, and up the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import checks
from ..ggpo.noise import RowNoise
from ..layers.view import lora_layers
from .measuring import LossFn, WorstDirection, attached, measuring


class WeightNoise:
    """What `weight_noise` yields, for changing the noise within the context.

    Attributes:
        sigma: σ, relative to each row's norm.
        step: number of the draw; each number has an ε of its own.
    """

    def __init__(self, noise: RowNoise):
        self._noise = noise

    @property
    def sigma(self) -> float:
        return self._noise.sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._noise.sigma = checks.number("sigma", value)

    @property
    def step(self) -> int:
        return self._noise.step

    @step.setter
    def step(self, value: int) -> None:
        self._noise.step = checks.integer("step", value, 0)


@contextmanager
def weight_noise(
    model: nn.Module, sigma: float, *, seed: int = 0, adapter: str | Iterable[str] | None = None
) -> Iterator[WeightNoise]:
    """Within the context every adapted layer computes at ``W' + ε``, in eval mode too; no weight is written to.

    Row i of ε has an expected norm of σ times that of row i of W' (m, n):

        ε_i ~ N(0, σ²/n · ‖W'_i‖² · I)

    ε stays the same until `step` or `sigma` of the yielded `WeightNoise` is set.

    Args:
        model: a model with adapters; a `GGPOOptimizer` may be on it.
        sigma: σ, relative to each row's norm.
        seed: of the private generator.
        adapter: name or names of the adapters whose layers are perturbed; None for all.

    Raises:
        ValueError: no adapted layer, an unknown adapter, a σ that is no finite number >= 0.
    """
    sigma = checks.number("sigma", sigma)
    noise = RowNoise(lora_layers(model, adapter), sigma, 0.0, "gaussian", 0, seed, always=True)
    with attached(model, noise):
        yield WeightNoise(noise)


@dataclass(frozen=True)
class NoiseRise:
    """What `noise_rise` measured, in the units of the loss.

    Attributes:
        loss: mean loss without noise.
        rise: mean rise of it under noise.
        error: standard error of `rise` over the draws; NaN of a single one.
    """

    loss: float
    rise: float
    error: float


@torch.no_grad()
def noise_rise(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    sigma: float = 0.03,
    draws: int = 8,
    seed: int = 0,
    adapter: str | Iterable[str] | None = None,
    progress: bool = False,
) -> NoiseRise:
    """How much the mean loss over `batches` rises under random weight noise: the smaller, the flatter.

        E[L(W' + ε)] − L(W')

    with ε as in `weight_noise`, one for all batches in each draw, in the units of the loss. The model is measured in
    eval mode and left in the mode it was found in.

    Args:
        model: a model with adapters.
        loss_fn: ``loss_fn(model, batch)`` returns the batch's mean loss as a scalar tensor.
        batches: any re-iterable of batches, counted equally.
        sigma: σ, noise relative to the norm of each row of ``W'``.
        draws: number of ε drawn.
        seed: of the private generator; equal seeds give models of the same shape the same standard normals.
        adapter: as in `weight_noise`.
        progress: whether to show a bar of tqdm.

    Raises:
        ValueError: no draws, no batches, no adapted layer.
        ImportError: `progress` without tqdm.
    """
    draws = checks.integer("draws", draws, 1)
    rises = []
    with (
        measuring(model, loss_fn, batches, "noise_rise", draws + 1, progress) as losses,
        weight_noise(model, sigma, seed=seed, adapter=adapter) as noise,
    ):
        noise.sigma = 0.0
        clean = losses.mean()
        noise.sigma = sigma
        for noise.step in range(draws):
            rises.append(losses.mean() - clean)
    spread = torch.tensor(rises, dtype=torch.float64)
    error = float(spread.std()) / draws**0.5 if draws > 1 else float("nan")
    return NoiseRise(clean, float(spread.mean()), error)


@torch.no_grad()
def worst_case_rise(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    adapter: str | Iterable[str] | None = None,
    progress: bool = False,
) -> float:
    """How much the mean loss over `batches` rises after one step of length ρ up its gradient in the full weights.

        L(W' + ρ·G/‖G‖_F) − L(W')

    with G the gradient of the mean loss L by all adapted layers' weights W' (m, n) together, the ascent step of
    sharpness-aware minimisation (arXiv:2010.01412, Eq. 2), in the units of the loss. It needs an (m, n) gradient per
    layer and an (n, n) identity. The model is measured in eval mode and left as it was found.

    Args:
        model, loss_fn, batches, adapter, progress: as in `noise_rise`.
        rho: ρ, the Frobenius norm of the step over all adapted layers.

    Raises:
        ValueError: no batches, no adapted layer.
    """
    rho = checks.number("rho", rho)
    step = WorstDirection(lora_layers(model, adapter))
    with measuring(model, loss_fn, batches, "worst_case_rise", 2, progress) as losses, attached(model, step):
        clean = step.find(losses)
        step.at = rho
        return losses.mean() - clean
