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
    """The batches, to be gone through several times; ValueError if there are none."""
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
    """Eval mode within the context, without the repacking of 4-bit weights that it may bring; afterwards each module's
    own mode."""
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
    """Within the context layers see the source's ε; no weight is written to, so an exception leaves no trace."""
    attachment = Attachment(model, source)
    try:
        yield
    finally:
        attachment.remove()


@contextmanager
def progress_bar(wanted: bool, total: int, name: str) -> Iterator[Callable[[], object]]:
    """Yields what to call after each of `total` batches; it moves a bar of tqdm if one is wanted.

    Raises:
        ImportError: a bar is wanted and tqdm is missing.
    """
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
    """``at · G/‖G‖_F``: up the gradient of the mean loss by all layers' weights together.

    It is an adapter of full rank, ``at · B·I``. Until `find` B is zero and `at` one, so that the gradient of B is the
    layer's whole G.
    """

    always = True

    def __init__(self, layers: list[LoRALayer]):
        super().__init__(layers)
        likes = [layer.all_adapters()[0].A for layer in layers]
        self.at = 1.0
        self.weights = [like.new_zeros(layer.shape).requires_grad_() for layer, like in zip(layers, likes, strict=True)]
        self._of = {layer.name: weight for layer, weight in zip(layers, self.weights, strict=True)}

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Adapter:
        weight = self._of[layer.name]
        return Adapter("", torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight, self.at)

    @torch.no_grad()
    def find(self, model: nn.Module, loss_fn: LossFn, batches: list[Any], advance: Callable[[], object]) -> float:
        """Sets the direction, zero where the gradient is; returns the mean loss."""
        grads = [torch.zeros_like(weight) for weight in self.weights]
        clean = 0.0
        for batch in batches:
            with torch.enable_grad():
                loss = loss_fn(model, batch) / len(batches)
            clean += float(loss)
            for total, grad in zip(grads, torch.autograd.grad(loss, self.weights), strict=True):
                total += grad
            advance()
        squares = [grad.to(sum_dtype(grad.device)).square().sum() for grad in grads]
        norm = torch.stack([square.to(squares[0]) for square in squares]).sum().sqrt()
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.copy_(grad / norm.to(grad.device) if norm > 0 else grad)
        return clean


class RandomDirection(Source):
    """``at · ε`` with one ε: that of `weight_noise` at σ = 1, whose rows have those of ``W'``'s norms on average."""

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
