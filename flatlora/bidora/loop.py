"""Watching the training batches of a loop that runs forward and backward itself, such as the Trainer's."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..streams import RandomStreams
from .passes import LossPass, Values, model_loss, parameters_of, parts_of


class _Hook:
    """Calls a method of the watch while that exists; in a copy of the model it does nothing."""

    def __init__(self, watch: LoopWatch, method: str):
        self._watch, self._method = weakref.ref(watch), method

    def __call__(self, *args: Any) -> None:
        if (watch := self._watch()) is not None:
            getattr(watch, self._method)(*args)

    def __reduce__(self) -> Any:
        return functools.partial, (_nothing,)


def _nothing(*args: Any) -> None: ...


class LoopWatch:
    """Remembers the calls of `model` in train mode, until `clear()`, and takes the gradients of `upper`'s parameters.

    While `on` is False it sees nothing; without `hooks`, as where there is no such loop, it never does. The model knows
    it weakly: it goes with its optimizer.
    """

    def __init__(self, model: nn.Module, upper: Optimizer, hooks: bool):
        self.on = True
        self.clear()
        self._handles: list[Any] = []
        if hooks:
            self._upper, self._magnitudes = upper, parameters_of(upper)
            self._handles += [
                model.register_forward_pre_hook(_Hook(self, "before")),
                model.register_forward_hook(_Hook(self, "after"), with_kwargs=True),
                # Collected before the loop clips, which would scale them, and which should see the directions alone.
                *(p.register_post_accumulate_grad_hook(_Hook(self, "collect")) for p in self._magnitudes),
            ]

    def __del__(self) -> None:
        self.remove()

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def clear(self) -> None:
        self.restore(([], {}))

    def snapshot(self) -> tuple[list[tuple[LossPass, Tensor]], Values]:
        """The forward passes with their losses, and ∂_μ so far; for `restore`."""
        return list(self._passes), dict(self._magnitude_grads)

    def restore(self, seen: tuple[list[tuple[LossPass, Tensor]], Values]) -> None:
        self._passes, self._magnitude_grads = seen
        self._streams: RandomStreams | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context it sees nothing."""
        on, self.on = self.on, False
        try:
            yield
        finally:
            self.on = on

    def train_loss(self) -> tuple[list[LossPass], Tensor]:
        """The passes that backward went through, and L_tr, weighted as the loop weighted them; ∂_μ goes to `.grad`."""
        used = [(one, loss) for one, loss in self._passes if one.weight is not None]
        if not used:
            raise RuntimeError(
                "step() with train_dataloader=None found no training batch: call model(**batch) with labels, in train "
                "mode, and backward() on the .loss it returns; or pass a train_dataloader"
            )
        value = torch.stack([one.part(loss) for one, loss in used]).sum()
        for p, grad in self._magnitude_grads.items():
            p.grad = grad
        return [one for one, _ in used], value

    def before(self, model: nn.Module, args: Any) -> None:
        if self.on and model.training and torch.is_grad_enabled():
            if set(parameters_of(self._upper)).isdisjoint(self._magnitudes):
                raise RuntimeError(
                    "the magnitudes are no longer in the groups of the BilevelOptimizer: copies stand in their place, "
                    "as under DeepSpeed's ZeRO and its fp16 and bf16 modes. Use ZeRO stage 0 in float32, or DDP"
                )
            *_, devices = parts_of(model)
            self._streams = RandomStreams(devices)

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        loss, streams, self._streams = model_loss(output), self._streams, None
        if not self.on or streams is None or loss is None or not loss.requires_grad:
            return

        def again() -> Tensor:
            found = model_loss(model(*args, **kwargs))
            assert found is not None
            return found

        one = LossPass(again, streams)
        self._passes.append((one, loss.detach()))

        def weigh(grad: Tensor) -> None:
            one.weight = grad.detach()

        loss.register_hook(weigh)

    def collect(self, p: Tensor) -> None:
        if self.on and p.grad is not None:
            before = self._magnitude_grads.get(p)
            self._magnitude_grads[p] = p.grad if before is None else before + p.grad
            p.grad = None
