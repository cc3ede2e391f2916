"""Phase two of BiDoRA: the directions trained anew under frozen magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.view import LoRALayer
from ..streams import derived_seed
from .data import Batches, to_device
from .levels import TwoLevels
from .loop import LoopWatch
from .orthogonality import add_orthogonality_gradient
from .parameters import reset_directions
from .passes import Noise, batch_loss, check_one_process, devices_of, finite

__all__ = ["Retraining"]


class Retraining(TwoLevels):
    """The part of `BilevelOptimizer` that both phases share, and the second of them."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor] | None
    adapter: str | Iterable[str] | None
    orthogonality: float
    phase: int = 1
    _seed: int
    _layers: list[LoRALayer]
    _noise: Noise
    _watch: LoopWatch | None
    _retraining: tuple[Batches, Optimizer] | None = None
    _to_resume: dict[str, Any] | None = None  # phase two in a checkpoint, until retrain() is called

    def retrain(self, dataloader: Any, steps: int, *, optimizer: Optimizer, scheduler: Any = None) -> list[float]:
        """Phase two: μ is frozen, A and B begin anew, and `optimizer` trains the directions on ``L + γ·R``.

        The first call ends phase one. Called again it goes on where it stopped, so that checkpoints can be taken in
        between; `state_dict` then covers `optimizer` and the position in `dataloader` too. With ``steps=0`` it freezes
        and re-initialises alone, for a loop of your own. A perturbation of `lower` is off, unless `optimizer` is it.

        Args:
            dataloader: batches of all the data, both splits together; cycled like the others.
            steps: number of optimizer steps to make now, one batch each.
            optimizer: a new optimizer of the directions. It must not hold magnitudes.
            scheduler: stepped after every step of `optimizer`.

        Returns:
            The loss of each step.

        Raises:
            ValueError: a model without magnitudes, `optimizer` holds some, an empty dataloader, a loss that is not a
                finite scalar; the step that failed has changed nothing.
            TypeError: an argument of the wrong type.
            RuntimeError: one of several distributed processes.
        """
        check_one_process()
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a built torch.optim.Optimizer, got {optimizer!r}")
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
        magnitudes = {id(p) for p in self._magnitudes()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held & magnitudes:
            raise ValueError(
                f"optimizer holds {len(held & magnitudes)} magnitudes, which are frozen in phase two; build it from "
                "direction_parameters(model)"
            )
        batches = Batches(dataloader, "dataloader", self._seed)
        if self.phase == 1:
            reset_directions(self.model, self.adapter, derived_seed(self._seed, "retrain"))
            self._enter_phase(2)
        elif self._to_resume is not None:
            batches.load_state_dict(self._to_resume["position"])
            optimizer.load_state_dict(self._to_resume["optimizer"])
        elif self._retraining is not None:
            batches.load_state_dict(self._retraining[0].state_dict())
        self._to_resume, self._retraining = None, (batches, optimizer)
        losses = []
        with nullcontext() if optimizer is self.lower else self._noise.off(but=held):
            for _ in range(steps):
                optimizer.zero_grad()
                batch = self._on_device(batches.next())
                with torch.enable_grad():
                    loss = self._loss(batch, "training")
                    loss.backward()
                losses += finite("training", loss.detach())
                if self.orthogonality > 0:
                    add_orthogonality_gradient(self._layers, self.orthogonality)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
        return losses

    def _enter_phase(self, phase: int) -> None:
        self.phase = phase
        for p in self._magnitudes():
            p.requires_grad_(phase == 1)
            p.grad = None
        if self._watch is not None:
            self._watch.on = phase == 1

    def retraining_state(self) -> dict[str, Any] | None:
        """Phase two's part of the checkpoint."""
        if self._retraining is None:
            return self._to_resume
        batches, optimizer = self._retraining
        return {"position": batches.state_dict(), "optimizer": optimizer.state_dict()}

    def load_retraining_state(self, phase: int, state: dict[str, Any] | None) -> None:
        self._enter_phase(phase)
        self._to_resume, self._retraining = state, None

    def _loss(self, batch: Any, which: str) -> Tensor:
        return batch_loss(self.model, batch, which, self.loss_fn)

    def _magnitudes(self) -> list[Tensor]:
        return [p for group in self.upper.param_groups for p in group["params"]]

    def _on_device(self, batch: Any) -> Any:
        return to_device(batch, devices_of(self.model)[0])
