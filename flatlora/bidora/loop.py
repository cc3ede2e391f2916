"""Watching the training batches of a loop that runs forward and backward itself, such as the Trainer's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..streams import RandomStreams
from .passes import TrainPass, devices_of, model_loss

__all__ = ["LoopWatch"]


class LoopWatch:
    """Remembers the calls of `model` in train mode, until `clear()`, and takes the magnitudes' gradients away.

    While `on` is False it sees nothing.
    """

    def __init__(self, model: nn.Module, magnitudes: Iterable[Tensor]):
        self.on = True
        self._passes: list[TrainPass] = []
        self._losses: list[Tensor] = []
        self._magnitude_grads: dict[Tensor, Tensor] = {}
        self._streams: RandomStreams | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, with_kwargs=True),
            # Taken before the loop clips, which would scale them, and which should see the directions alone.
            *(p.register_post_accumulate_grad_hook(self._take) for p in magnitudes),
        ]

    def take(self) -> tuple[list[TrainPass], Tensor, dict[Tensor, Tensor]]:
        """The passes that backward went through, their weighted loss and its ∂_μ.

        Raises:
            RuntimeError: there are none.
        """
        used = [(one, loss) for one, loss in zip(self._passes, self._losses, strict=True) if one.weight is not None]
        if not used:
            raise RuntimeError(
                "step() with train_dataloader=None found no training batch: call model(**batch) with labels, in train "
                "mode, and backward() on the .loss it returns; or pass a train_dataloader"
            )
        total = torch.stack([one.part(loss) for one, loss in used]).sum()
        return [one for one, _ in used], total, self._magnitude_grads

    def clear(self) -> None:
        self._passes, self._losses, self._magnitude_grads, self._streams = [], [], {}, None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within the context it sees nothing."""
        on, self.on = self.on, False
        try:
            yield
        finally:
            self.on = on

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before(self, model: nn.Module, args: Any) -> None:
        if self.on and model.training and torch.is_grad_enabled():
            self._streams = RandomStreams(devices_of(model))

    def _after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        loss, streams, self._streams = model_loss(output), self._streams, None
        if not self.on or streams is None or loss is None or not loss.requires_grad:
            return

        def again() -> Tensor:
            found = model_loss(model(*args, **kwargs))
            assert found is not None
            return found

        one = TrainPass(again, streams)
        self._passes.append(one)
        self._losses.append(loss.detach())

        def weigh(grad: Tensor) -> None:
            one.weight = grad.detach()

        loss.register_hook(weigh)

    def _take(self, p: Tensor) -> None:
        if self.on and p.grad is not None:
            before = self._magnitude_grads.get(p)
            self._magnitude_grads[p] = p.grad if before is None else before + p.grad
            p.grad = None
