"""Phase two of BiDoRA: the directions trained anew under frozen magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..streams import derived_seed
from ..wrapper import OptimizerWrapper, chain, load_base
from .data import Batches, check_position
from .levels import check_optimizer_state, shapes_of
from .loop import LoopWatch
from .parameters import direction_parameters, reset_directions
from .passes import Values, assign, finite, parameters_of
from .perturbations import unperturbed
from .snapshot import undone_on_error

__all__ = ["PhaseTwo"]


class PhaseTwo:
    """Whether the second phase has begun, and how far it has come with which optimizer in which batches.

    After a load it waits for `run`, which gets an optimizer and a dataloader to go on with.
    """

    def __init__(
        self,
        lower: Optimizer,
        upper: Optimizer,
        model: nn.Module,
        adapter: str | Iterable[str] | None,
        watch: LoopWatch | None,
    ) -> None:
        self._lower, self._upper, self._model, self._adapter, self.watch = lower, upper, model, adapter, watch
        self.phase = 1
        self._batches: Batches | None = None
        self._optimizer: Optimizer | None = None
        self._loaded: dict[str, Any] | None = None

    def run(
        self,
        dataloader: Any,
        steps: int,
        optimizer: Optimizer,
        scheduler: Any,
        seed: int,
        backward: Callable[[Any], Tensor],
    ) -> list[float]:
        """`steps` steps of `optimizer` along the gradients that ``backward(batch)`` leaves; it returns the loss.

        Raises:
            ValueError, TypeError: bad arguments, or such as can't go on from the checkpoint. Nothing has changed then.
        """
        checks.built_optimizer("optimizer", optimizer)
        steps = checks.integer("steps", steps, 0)
        if scheduler is not None and not callable(getattr(scheduler, "step", None)):
            raise TypeError(f"scheduler must have a step() method, got {type(scheduler).__name__}")
        self._refuse_magnitudes(optimizer)
        losses: list[float] = []
        with self._begun(seed, losses), unperturbed(self._not_of(optimizer)):
            self._take_up(dataloader, optimizer, seed)
            for _ in range(steps):
                losses += self._step(backward, scheduler)
        return losses

    def _step(self, backward: Callable[[Any], Tensor], scheduler: Any) -> list[float]:
        assert self._batches is not None and self._optimizer is not None
        with undone_on_error(self._model, [self._optimizer], [self._batches]):
            self._optimizer.zero_grad()
            loss = finite("training", backward(self._batches.next()))
            self._optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return loss

    def _refuse_magnitudes(self, optimizer: Optimizer) -> None:
        if shared := set(parameters_of(optimizer)) & set(parameters_of(self._upper)):
            raise ValueError(
                f"optimizer holds {len(shared)} magnitudes, which are frozen in phase two; build it from "
                "direction_parameters(model)"
            )

    def _not_of(self, optimizer: Optimizer) -> list[OptimizerWrapper]:
        """The wrappers of `lower` whose perturbations are no concern of `optimizer`."""
        own, trained = {id(wrapper) for wrapper in chain(optimizer)}, set(parameters_of(optimizer))
        others = (wrapper for wrapper in chain(self._lower) if id(wrapper) not in own)
        return [wrapper for wrapper in others if trained.isdisjoint(wrapper.perturbation_parameters())]

    def _take_up(self, dataloader: Any, optimizer: Optimizer, seed: int) -> None:
        """Goes on with these where it stopped; the first time, from the first batch."""
        batches = self._batches
        if batches is None or batches.loader is not dataloader:
            batches = Batches(dataloader, "dataloader", seed)
            if self._loaded is not None:
                batches.load_state_dict(self._loaded["position"])
            elif self._batches is not None:
                batches.load_state_dict(self._batches.state_dict())
        if self._loaded is not None:
            check_optimizer_state(self._loaded["optimizer"], self._loaded["shapes"], optimizer)
            load_base(optimizer, self._loaded["optimizer"])
        self._batches, self._optimizer, self._loaded = batches, optimizer, None

    @contextmanager
    def _begun(self, seed: int, losses: list[float]) -> Iterator[None]:
        """Begins the phase, unless it has; if its very first step fails, it has not begun."""
        if self.phase == 2:
            yield
            return
        directions: Values = {p: p.detach().clone() for p in direction_parameters(self._model, self._adapter)}
        grads = [(p, p.grad) for p in parameters_of(self._upper)]
        reset_directions(self._model, self._adapter, derived_seed(seed, "retrain"))
        self._enter(2)
        try:
            yield
        except BaseException:
            if not losses:
                self.load_state_dict(1, None)
                assign(directions)
                for p, grad in grads:
                    p.grad = grad
            raise

    def _enter(self, phase: int) -> None:
        self.phase = phase
        for p in parameters_of(self._upper):
            p.requires_grad_(phase == 1)
            p.grad = None
        if self.watch is not None:
            self.watch.on = phase == 1

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """None in phase one."""
        if self._batches is None or self._optimizer is None:
            return self._loaded
        return {
            "position": self._batches.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "shapes": shapes_of(self._optimizer),
        }

    @staticmethod
    def check_state_dict(phase: Any, state: Any) -> None:
        """Raises ValueError unless `state` has the form of what `state_dict` gives in this phase. Changes nothing."""
        checks.option("phase in the state_dict", checks.integer("phase in the state_dict", phase, 1), (1, 2))
        if (phase == 2) != (state is not None):
            raise ValueError(
                f"the state_dict is of phase {phase} and has {'no' if state is None else 'a'} state of a second phase; "
                "it is damaged, load another"
            )
        if state is not None:
            checks.state_fields("retrain", state, "position", "optimizer", "shapes")
            check_position("dataloader", state["position"])
            checks.state_fields("retrain optimizer's", state["optimizer"])

    def load_state_dict(self, phase: int, state: dict[str, Any] | None) -> None:
        self._batches, self._optimizer, self._loaded = None, None, state
        self._enter(phase)
