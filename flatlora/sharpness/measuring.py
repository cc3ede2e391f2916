"""What every measure is made of: losses in eval mode, and directions in the full weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..ggpo.noise import RowNoise
from ..kernels.draw import Draw
from ..layers.adapter import Adapter
from ..layers.base import sum_dtype
from ..layers.bnb import hold_training_layout
from ..layers.view import LoRALayer
from ..perturbation.attachment import Attachment
from ..perturbation.source import Source

LossFn = Callable[[nn.Module, Any], Tensor]


class Losses:
    """The losses of a model over batches, one after the other; `measuring` makes it."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, batches: list[Any], advance: Callable[[], object]):
        self.model, self.loss_fn, self.batches, self.advance = model, loss_fn, batches, advance

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield self.loss_fn(self.model, batch)
            self.advance()

    def differentiable(self) -> Iterator[Tensor]:
        """The same, for gradients; TypeError for a loss that has none."""
        for loss in self:
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise TypeError(
                    f"loss_fn must return a tensor that requires a gradient, as it is derived; got {loss!r}"
                )
            yield loss

    def __len__(self) -> int:
        return len(self.batches)

    def mean(self) -> float:
        """The mean over batches, each counted equally."""
        return sum(map(float, self)) / len(self)


@contextmanager
def measuring(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], name: str, passes: int, progress: bool
) -> Iterator[Losses]:
    """Eval mode within the context, in which 4-bit weights are not repacked; afterwards each module's own mode.

    With `progress` a bar of tqdm goes through that many passes over the batches.
    """
    found = list(batches)
    if not found:
        raise ValueError("need at least one batch, got none")
    bar = _progress_bar(passes * len(found), name) if progress else None
    modes = [(module, module.training) for module in checks.module(model).modules()]
    layout = hold_training_layout(model)
    model.eval()
    try:
        with nullcontext() if bar is None else bar:
            yield Losses(model, loss_fn, found, (lambda: None) if bar is None else bar.update)
    finally:
        layout.release()
        for module, mode in modes:
            module.training = mode


def _progress_bar(total: int, name: str) -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError as reason:
        raise ImportError("progress=True shows a bar of tqdm; install it with: pip install tqdm") from reason
    return tqdm(total=total, desc=name, unit="batch")


@contextmanager
def attached(model: nn.Module, source: Source) -> Iterator[None]:
    """Within the context layers see the source's ε; no weight is written to."""
    attachment = Attachment(model, source)
    try:
        yield
    finally:
        attachment.remove()


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
    def find(self, losses: Losses) -> float:
        """Sets the direction, zero where the gradient is; returns the mean loss."""
        weights = list(self.weights.values())
        grads = [torch.zeros_like(weight) for weight in weights]
        clean = 0.0
        with torch.enable_grad():
            for loss in losses.differentiable():
                part = loss / len(losses)
                clean += float(part)
                for total, grad in zip(grads, torch.autograd.grad(part, weights), strict=True):
                    total += grad
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
