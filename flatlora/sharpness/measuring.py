"""What every measure is made of: the mean loss in eval mode, directions in the full weights, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ggpo.noise import RowNoise
from ..kernels.draw import Draw
from ..layers.adapter import Adapter
from ..layers.base import sum_dtype
from ..layers.bnb import hold_training_layout
from ..layers.view import LoRALayer
from ..perturbation.attachment import Attachment
from ..perturbation.source import Source

__all__ = [
    "LossFn",
    "RandomDirection",
    "WorstDirection",
    "attached",
    "evaluating",
    "list_of",
    "mean_loss",
    "progress_bar",
]

LossFn = Callable[[nn.Module, Any], Tensor]


def list_of(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list; ValueError if there are none."""
    if not (found := list(batches)):
        raise ValueError("need at least one batch, got none")
    return found


def mean_loss(model: nn.Module, loss_fn: LossFn, batches: list[Any], advance: Callable[[], object]) -> float:
    """The mean over batches, each counted equally; `advance` is called after every one."""
    total = 0.0
    for batch in batches:
        total += float(loss_fn(model, batch))
        advance()
    return total / len(batches)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the context, in which 4-bit weights are not repacked; afterwards each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    layout = hold_training_layout(model)
    model.eval()
    try:
        yield
    finally:
        layout.release()
        for module, mode in modes:
            module.training = mode


@contextmanager
def attached(model: nn.Module, source: Source) -> Iterator[None]:
    """Within the context layers see the source's ε; no weight is written to."""
    attachment = Attachment(model, source)
    try:
        yield
    finally:
        attachment.remove()


@contextmanager
def progress_bar(wanted: bool, total: int, name: str) -> Iterator[Callable[[], object]]:
    """Yields what to call after each of `total` batches. It moves a bar of tqdm if one is wanted."""
    if not wanted:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError as reason:
        raise ImportError("progress=True shows a bar of tqdm; install it with: pip install tqdm") from reason
    with tqdm(total=total, desc=name, unit="batch") as bar:
        yield bar.update


class WorstDirection(Source):
    """``at · G/‖G‖_F``, with G the gradient of the mean loss by all layers' weights together.

    It is an adapter of full rank, ``at · B·I``. Before `find`, B is zero and `at` 1, so that G is the gradient of B.
    """

    always = True

    def __init__(self, layers: list[LoRALayer]):
        super().__init__(layers)
        self.at = 1.0
        self.weights = {
            layer.name: layer.all_adapters()[0].A.new_zeros(layer.shape).requires_grad_() for layer in layers
        }

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Adapter:
        weight = self.weights[layer.name]
        return Adapter("", torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight, self.at)

    @torch.no_grad()
    def find(self, model: nn.Module, loss_fn: LossFn, batches: list[Any], advance: Callable[[], object]) -> float:
        """Sets the direction, zero where the gradient is; returns the mean loss."""
        weights = list(self.weights.values())
        grads = [torch.zeros_like(weight) for weight in weights]
        clean = 0.0
        for batch in batches:
            with torch.enable_grad():
                loss = loss_fn(model, batch) / len(batches)
            clean += float(loss)
            for total, grad in zip(grads, torch.autograd.grad(loss, weights), strict=True):
                total += grad
            advance()
        squares = [grad.to(sum_dtype(grad.device)).square().sum() for grad in grads]
        norm = torch.stack([square.to(squares[0]) for square in squares]).sum().sqrt()
        for weight, grad in zip(weights, grads, strict=True):
            weight.copy_(grad / norm.to(grad.device) if norm > 0 else grad)
        return clean


class RandomDirection(Source):
    """``at · ε``, with the ε of `weight_noise` at σ = 1."""

    always = True

    def __init__(self, layers: list[LoRALayer], seed: int):
        super().__init__(layers)
        self.at = 0.0
        self._noise = RowNoise(layers, 1.0, 0.0, "gaussian", 0, seed, always=True)

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Draw | None:
        draw = self._noise.draw(layer, adapters)
        return None if draw is None or self.at == 0 else replace(draw, std=draw.std * self.at)

    def weight_norm(self) -> float:
        """``‖W'‖_F`` over all layers together."""
        for layer in self.layers.values():
            self._noise.std(layer)
        squares = self._noise.squares()
        return 0.0 if squares is None else float(squares[0].sqrt())
