"""Measuring how flat the minimum is that a fine-tuned model sits in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .ggpo.noise import RowNoise
from .layers.adapter import Adapter
from .layers.view import LoRALayer, lora_layers
from .perturbation import Attachment, Source

__all__ = ["NoiseRise", "WeightNoise", "noise_rise", "weight_noise", "worst_case_rise"]


class WeightNoise:
    """What `weight_noise` yields: the noise that is on a model, to be changed while it is.

    Attributes:
        sigma: σ, relative to each row's norm.
        step: number of the draw; another number is another ε.
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

    Row i of ε is drawn from ``N(0, σ²/n · ‖W'_i‖² · I)``: its expected norm is σ times the row's. The same ε holds
    until `step` or `sigma` of the `WeightNoise` that the context yields is set.

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
    with _attached(model, noise, [rows.layer for rows in noise.rows.values()]):
        yield WeightNoise(noise)


@contextmanager
def _attached(model: nn.Module, source: Source, layers: list[LoRALayer]) -> Iterator[None]:
    attachment = Attachment(model, source)
    try:
        for layer in layers:
            attachment.add(layer)
        yield
    finally:
        attachment.remove()


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
    rises = []
    with evaluating(model), weight_noise(model, sigma, seed=seed, adapter=adapter) as noise:
        noise.sigma = 0.0
        clean = _mean_loss(model, loss_fn, batches)
        noise.sigma = sigma
        for noise.step in range(draws):
            rises.append(_mean_loss(model, loss_fn, batches) - clean)
    spread = torch.tensor(rises, dtype=torch.float64)
    error = float(spread.std()) / draws**0.5 if draws > 1 else float("nan")
    return NoiseRise(clean, float(spread.mean()), error)


@torch.no_grad()
def worst_case_rise(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    rho: float = 0.05,
    adapter: str | Iterable[str] | None = None,
) -> float:
    """How much the mean loss over `batches` rises after one step of length ρ up its gradient in the full weights.

    The step is ``ρ·G/‖G‖_F`` with G the gradient of the mean loss by all adapted layers' weights together: the ascent
    step of sharpness-aware minimisation (arXiv:2010.01412, Eq. 2), taken where LoRA can't. Needs one (m, n) gradient
    per layer and an (n, n) identity: a tool for measuring, not for training. The model is measured in eval mode and
    left as it was found.

    Args:
        model, loss_fn, batches, adapter: as in `noise_rise`.
        rho: ρ, the Frobenius norm of the step over all adapted layers.

    Raises:
        ValueError: no batches, no adapted layer.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("need at least one batch, got none")
    layers = lora_layers(model, adapter)
    step = _FullStep(layers)
    with evaluating(model), _attached(model, step, layers):
        clean = 0.0
        for batch in batches:
            with torch.enable_grad():
                loss = loss_fn(model, batch) / len(batches)
            clean += float(loss)
            for total, grad in zip(step.grads, torch.autograd.grad(loss, step.weights), strict=True):
                total += grad
        norm = torch.stack([grad.double().square().sum() for grad in step.grads]).sum().sqrt()
        for weight, grad in zip(step.weights, step.grads, strict=True):
            weight.copy_(grad * (rho / norm))
        return _mean_loss(model, loss_fn, batches) - clean


class _FullStep(Source):
    """ε as an adapter of full rank, ``B·I``: zero at first, so that the gradient of B is the layer's whole G."""

    always = True

    def __init__(self, layers: list[LoRALayer]):
        likes = [layer.all_adapters()[0].A for layer in layers]
        self.weights = [like.new_zeros(layer.shape).requires_grad_() for layer, like in zip(layers, likes, strict=True)]
        self.grads = [torch.zeros_like(weight) for weight in self.weights]
        self._of = {layer.name: weight for layer, weight in zip(layers, self.weights, strict=True)}

    def draw(self, layer: LoRALayer) -> Adapter:
        weight = self._of[layer.name]
        return Adapter("", torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight, 1.0)


def _mean_loss(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: list[Any]) -> float:
    return sum(float(loss_fn(model, batch)) for batch in batches) / len(batches)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the context; every module's own mode is given back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
