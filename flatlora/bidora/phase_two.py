"""Phase two of BiDoRA: the directions trained anew under frozen magnitudes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..streams import derived_seed
from ..wrapper import load_base, wrappers_of
from .data import Batches, check_position
from .levels import TwoLevels, check_optimizer_state, shapes_of
from .loop import LoopWatch
from .parameters import direction_parameters, reset_directions
from .passes import assign, copies, finite, parameters_of, together, undone_on_error


class TwoPhases(TwoLevels):
    """Two levels that the first phase trains by the method's `step`; `retrain` then trains the lower alone.

    The method sets what is declared here and overrides `retrain_gradients`. After a load the second phase waits for
    `retrain`, which gets an optimizer and a dataloader to go on with.
    """

    model: nn.Module
    adapter: str | Iterable[str] | None
    _seed: int
    _watch: LoopWatch
    _batches: Batches | None
    _second: Optimizer | None  # that `retrain` was given
    _loaded: dict[str, Any] | None

    def __init__(self, lower: Optimizer, upper: Optimizer):
        super().__init__(lower, upper)
        # Of the instance: a default of the class would hide them from classes that others derive, as Lightning does.
        self.phase = 1  # 2 once `retrain` has begun
        self._batches = self._second = self._loaded = None

    def retrain_gradients(self, batch: Any) -> Tensor:
        """``∇_V (L + γ·R)`` into `.grad`; returns L."""
        raise NotImplementedError

    def retrain(self, dataloader: Any, steps: int, *, optimizer: Optimizer, scheduler: Any = None) -> list[float]:
        """Phase two: μ is frozen, A and B begin anew, and `optimizer` trains the directions on ``L + γ·R``.

        The first call ends phase one. Called again it goes on where it stopped, so that checkpoints can be taken in
        between; `state_dict` then covers `optimizer` and the position in `dataloader` too. With ``steps=0`` it freezes
        and re-initialises alone, for a loop of your own. The perturbations of `lower` are off, but for those that
        `optimizer` makes too or whose parameters it holds.

        Args:
            dataloader: batches of all the data, both splits together; cycled like the others.
            steps: number of optimizer steps to make now, one batch each.
            optimizer: a new optimizer of the directions. It must not hold magnitudes.
            scheduler: stepped after every step of `optimizer`.

        Returns:
            The loss of each step.

        Raises:
            ValueError: a model without magnitudes, `optimizer` holds some, an empty dataloader, a dataloader or an
                `optimizer` other than the checkpoint's, a loss that is not a finite scalar. Everything is as before
                the step that failed; if it was the first of all, phase one has not ended.
            TypeError: an argument of the wrong type.
        """
        checks.built_optimizer("optimizer", optimizer)
        steps = checks.integer("steps", steps, 0)
        if scheduler is not None and not callable(getattr(scheduler, "step", None)):
            raise TypeError(f"scheduler must have a step() method, got {type(scheduler).__name__}")
        trained = set(parameters_of(optimizer))
        if shared := trained.intersection(parameters_of(self.upper)):
            raise ValueError(
                f"optimizer holds {len(shared)} magnitudes, which are frozen in phase two; build it from "
                "direction_parameters(model)"
            )
        losses: list[float] = []
        own = list(wrappers_of(optimizer))
        others = [wrapper for wrapper in wrappers_of(self.lower) if wrapper not in own]
        lifted = together(w.unperturbed() for w in others if trained.isdisjoint(w.perturbation_parameters()))
        with self._phase_two(losses), lifted:
            batches = self._resumed(dataloader, optimizer)
            for _ in range(steps):
                with undone_on_error(self.model, [optimizer], [batches], self._watch):
                    optimizer.zero_grad()
                    loss = finite(("training loss", self.retrain_gradients(batches.next())))
                    optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
                losses += loss
        return losses

    @contextmanager
    def _phase_two(self, losses: list[float]) -> Iterator[None]:
        """Begins the phase unless it has begun; undone if its very first step fails."""
        if self.phase == 2:
            yield
            return
        directions = copies(direction_parameters(self.model, self.adapter))
        grads = [(p, p.grad) for p in parameters_of(self.upper)]
        reset_directions(self.model, self.adapter, derived_seed(self._seed, "retrain"))
        self._enter(2)
        try:
            yield
        except BaseException:
            if not losses:
                self.load_phase(1, None)
                assign(directions)
                for p, grad in grads:
                    p.grad = grad
            raise

    def _enter(self, phase: int) -> None:
        self.phase = phase
        for p in parameters_of(self.upper):
            p.requires_grad_(phase == 1)
            p.grad = None
        self._watch.on = phase == 1

    def _resumed(self, dataloader: Any, optimizer: Optimizer) -> Batches:
        """The batches where phase two stopped, or from the first; `optimizer` gets a loaded state."""
        batches = self._batches
        if batches is None or batches.loader is not dataloader:
            batches = Batches(dataloader, "dataloader", self._seed)
            if (state := self.phase_state()) is not None:
                batches.load_state_dict(state["position"])
        if self._loaded is not None:
            check_optimizer_state(self._loaded["optimizer"], self._loaded["shapes"], optimizer)
            load_base(optimizer, self._loaded["optimizer"])
        self._batches, self._second, self._loaded = batches, optimizer, None
        return batches

    def phase_state(self) -> dict[str, Any] | None:
        """What the second phase goes on with; None in phase one."""
        if self._batches is None or self._second is None:
            return self._loaded
        return {
            "position": self._batches.state_dict(),
            "optimizer": self._second.state_dict(),
            "shapes": shapes_of(self._second),
        }

    @staticmethod
    def check_phase(phase: Any, state: Any) -> None:
        """Raises ValueError unless `state` has the form of what `phase_state` gives in this phase. Changes nothing."""
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

    def load_phase(self, phase: int, state: dict[str, Any] | None) -> None:
        self._batches, self._second, self._loaded = None, None, state
        self._enter(phase)
