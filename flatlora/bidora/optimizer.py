"""BiDoRA: directions on the training split, magnitudes on the validation split, by real hypergradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers.bnb import hold_training_layout
from ..layers.view import LoRALayer, lora_layers
from ..streams import RandomStreams, derived_seed, shared_seed
from .data import Batches
from .loop import LoopWatch
from .orthogonality import add_orthogonality_gradient
from .parameters import check_levels, is_peft
from .passes import (
    Noise,
    TrainPass,
    Values,
    assign,
    check_one_process,
    devices_of,
    finite,
    frozen,
    grads_of,
    moved,
    norm_of,
    traceless,
)
from .phase_two import Retraining

__all__ = ["BilevelOptimizer", "BilevelStep"]


@dataclass(frozen=True)
class BilevelStep:
    """What one iteration saw.

    Attributes:
        train_loss: L_tr(V, μ) of the last lower step, without γ·R.
        val_loss: L_val(V', μ) before the upper step; None where a call of `step()` did not reach the upper level.
        lower_grad_norm: ‖∇_V (L_tr + γ·R)‖ as the last lower step took it.
        upper_grad_norm: norm of the hypergradient; None as `val_loss`.
    """

    train_loss: float
    val_loss: float | None
    lower_grad_norm: float
    upper_grad_norm: float | None


class BilevelOptimizer(Retraining):
    """Trains directions V on one dataloader and magnitudes μ on another, by gradients through the inner step.

    BiDoRA (arXiv:2410.09758, Eq. 6-9 and Algorithm 1; the difference is Eq. 8 of DARTS, arXiv:1806.09055) solves

        min_μ L_val(V*(μ), μ)    with    V*(μ) = argmin_V L_tr(V, μ) + γ·R(V)

    One iteration makes `unroll_steps` steps of `lower` on training batches, μ frozen, from V to V' in the last one, and
    then one step of `upper` with the hypergradient

        ∂_μ L_val(V', μ) − ξ·∇²_{μV} L_tr(V, μ)·v,    v = ∇_V L_val(V', μ)

    whose second term is a finite difference of ∂_μ L_tr around V, on the training batch just used, over ``e·v`` with
    ``e = epsilon/‖v‖``. The passes it subtracts see the same dropout, and the noise of a `GGPOOptimizer` or the
    auxiliary of a `BiLoRAOptimizer` as `lower` as they were in the lower pass: L_tr is the perturbed loss. L_val is
    that of the unperturbed model. R does not depend on μ and so is not in the difference.

    PEFT treats DoRA's norm ``‖W0 + s·B·A‖`` as a constant in backward. ∂_μ is exact all the same, and the difference
    moves the norm along with V: the second term is the exact derivative of ∂_μ L_tr along v. But v lacks the part of
    ∇_V L_val through the norm, and so does the gradient that made V': the hypergradient is that of the loss with v
    so defined, not the full derivative of ``L_val(V'(μ), μ)``.

    The random streams end a step as if its lower passes alone had run. If a pass fails or a loss is not finite, every
    parameter is put back to where it was before `step()`; the moments of `lower` may have advanced by then.
    It runs in one process: gradients are not averaged over the ranks of a distributed run, which is refused.
    Under bfloat16 rounding drowns the difference: keep A, B and μ in float32, as PEFT does, and compute in float32.

    Args:
        lower: a built optimizer of the directions, and of a new head if there is one.
        upper: a built optimizer of the magnitudes.
        model: the model. Without PEFT adapters any two-level problem will do, whatever `lower` and `upper` hold.
        train_dataloader: batches of the lower level, cycled for ever and reshuffled each epoch (see
            `flatlora.bidora.data.Batches`). None if another's loop, such as the Hugging Face Trainer, runs forward and
            backward of the training batches itself and calls `step()`; see below.
        val_dataloader: batches of the upper level.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar tensor; by default ``model(**batch).loss``.
        xi: ξ ≥ 0, or ``"lr"`` for the learning rate of each of the lower's groups. 0 drops the second term and its
            passes, which is a different method: alternating first-order updates.
        unroll_steps: lower steps per upper step.
        difference: ``"central"``, with an error in e², two more passes; or ``"forward"``, with an error in e, one more,
            as it reuses the lower pass.
        epsilon: length of the finite-difference step, in the norm over all of V.
        orthogonality: γ ≥ 0 of R, the mean over the layers of ``‖DᵀD − I‖_F``; 0 skips it.
        adapter: name or names of the adapters; None for all.

    With ``train_dataloader=None`` the batches of the loop are taken from its calls of ``model(**batch)`` in train mode,
    and weighted as its ``backward`` weighted the output's ``.loss``, so gradients may be accumulated. μ gets no
    gradient from it, so clipping sees V alone; γ·∇R is added after clipping. No float16 loss scaling.

    Raises:
        ValueError: a model without magnitudes, levels that overlap or are swapped, parameters of another model, an
            empty dataloader, a bad number. From `step()` also a loss that is not a finite scalar or a batch without
            labels.
        TypeError: an argument of the wrong type.
        RuntimeError: one of several distributed processes.

    Example:
        >>> lower = torch.optim.AdamW(direction_parameters(model), lr=5e-5, weight_decay=0.1)
        >>> upper = torch.optim.AdamW(magnitude_parameters(model), lr=5e-5, weight_decay=0.1)
        >>> optimizer = BilevelOptimizer(lower, upper, model, train_dataloader, val_dataloader)
        >>> for _ in range(1000):
        ...     losses = optimizer.step()
    """

    def __init__(
        self,
        lower: Optimizer,
        upper: Optimizer,
        model: nn.Module,
        train_dataloader: Any,
        val_dataloader: Any,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        xi: float | Literal["lr"] = 1.0,
        unroll_steps: int = 1,
        difference: Literal["central", "forward"] = "central",
        epsilon: float = 0.01,
        orthogonality: float = 1e-5,
        adapter: str | Iterable[str] | None = None,
    ):
        super().__init__(lower, upper)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(model, batch), got {loss_fn!r}")
        _check_form(xi, unroll_steps, difference, epsilon, orthogonality)
        check_one_process()
        self.model, self.loss_fn, self.adapter = model, loss_fn, adapter
        check_levels(lower, upper, model, adapter)
        if train_dataloader is val_dataloader is not None:
            warnings.warn(
                "the same object is both train_dataloader and val_dataloader, so magnitudes are trained on the data of "
                "the directions; split the data, for example with flatlora.split_dataset",
                stacklevel=2,
            )
        self._seed = shared_seed()
        self._train = None
        if train_dataloader is not None:
            self._train = Batches(train_dataloader, "train_dataloader", self._seed)
        self._val = Batches(val_dataloader, "val_dataloader", self._seed)
        self.xi, self.unroll_steps, self.difference = xi, unroll_steps, difference
        self.epsilon, self.orthogonality = epsilon, orthogonality
        self.last_step: BilevelStep | None = None  # for loops that do not hand out what step() returns
        self._lower_steps = 0
        self._noise = Noise(lower)
        self._layers = self._trained_layers()
        self._layout = hold_training_layout(model)
        self._watch = LoopWatch(model, self._magnitudes()) if self._train is None else None

    # --- the method -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> BilevelStep:  # type: ignore[override]
        """One iteration; with ``train_dataloader=None`` one lower step, and every `unroll_steps`-th time an upper one.

        The gradients that the levels took stay in `.grad`.

        Args:
            closure: forward and backward of the training batch, if the loop passes one; ``train_dataloader=None`` only.

        Raises:
            ValueError: a loss that is not a finite scalar, or a batch without labels. Parameters are as before.
            RuntimeError: the second phase has begun, or the loop has given no gradients.
        """
        check_one_process()
        if self.phase == 2:
            raise RuntimeError(
                "retrain() has begun the second phase, which freezes the magnitudes; call retrain() again"
            )
        if closure is not None:
            if self._watch is None:
                raise ValueError("step() runs the training batches itself; a closure needs train_dataloader=None")
            with torch.enable_grad():
                closure()
        start = self._lower_values()
        try:
            self.last_step = self._iterate(start)
        except BaseException:
            assign(start)
            raise
        finally:
            if self._watch is not None:
                self._watch.clear()
        return self.last_step

    def _iterate(self, before: Values) -> BilevelStep:
        for i in range(self.unroll_steps if self._watch is None else 1):
            before, noise = before if i == 0 else self._lower_values(), self._noise.present()
            passes, train, magnitude_grads = self._lower_pass()
            if self.orthogonality > 0:
                add_orthogonality_gradient(self._layers, self.orthogonality)
            seen = finite("training", train, norm_of(grads_of(self._directions())))
            self.lower.step()
            self._lower_steps += 1
        if self._watch and self._lower_steps % self.unroll_steps:
            return BilevelStep(seen[0], None, seen[1], None)
        val, grads = self._validation(self._on_device(self._val.next()))
        second = self._second_order(grads, before, passes, magnitude_grads, noise)
        for p, grad in zip(self._magnitudes(), self._difference(grads, second), strict=True):
            p.grad = grad
        result = finite("validation", val, norm_of(grads_of(self._magnitudes())))
        self.upper.step()
        return BilevelStep(seen[0], result[0], seen[1], result[1])

    def _lower_pass(self) -> tuple[list[TrainPass], Tensor, Values]:
        """∇_V L_tr into `.grad`. Returns the passes, L_tr and, where it comes for free and is wanted, ∂_μ L_tr."""
        if self._watch is not None:
            return self._watch.take()
        assert self._train is not None
        batch = self._on_device(self._train.next())
        passes = [TrainPass(lambda: self._loss(batch, "training"), RandomStreams(devices_of(self.model)))]
        reuse = self.difference == "forward" and self.xi != 0
        with nullcontext() if reuse else frozen(self._magnitudes()):
            loss = self._backward(passes)
        magnitude_grads = grads_of(self._magnitudes())
        self.upper.zero_grad()
        return passes, loss, magnitude_grads

    def _validation(self, batch: Any) -> tuple[Tensor, Values]:
        """L_val at the present parameters, unperturbed, and its gradient of both levels."""
        # Dropout in this pass draws from a seed of its own, or it would shift the stream of the lower passes.
        with self._aside(derived_seed(self._seed, "validation", self._lower_steps)), self._noise.off():
            loss = self._backward([TrainPass(lambda: self._loss(batch, "validation"))])
            return loss, grads_of([*self._directions(), *self._magnitudes()])

    def _second_order(
        self, val_grads: Values, before: Values, passes: list[TrainPass], magnitude_grads: Values, noise: Any
    ) -> Values:
        """``ξ·∇²_{μV} L_tr(V, μ)·v`` by finite difference around V = `before`; empty for ξ = 0.

        ξ may differ between groups, so the difference is taken along ``u = ξ·v``, at ``V ± epsilon·u/‖u‖``.
        """
        if self.xi == 0:
            return {}
        u = {p: xi * val_grads[p] for p, xi in self._step_sizes().items() if p in val_grads}
        length = norm_of(u)
        scale = torch.where(length > 0, self.epsilon / length, 0.0)  # v may vanish, and so may a learning rate

        def gradient_at(scale: Tensor) -> Values:
            point = {p: value + scale.to(value) * u[p] if p in u else value for p, value in before.items()}
            with moved(point):
                self._backward(passes)
            return grads_of(self._magnitudes())

        with self._aside(), self._noise.as_in(noise), frozen(list(before)):
            ahead = gradient_at(scale)
            behind = magnitude_grads if self.difference == "forward" else gradient_at(-scale)
        factor = length / (self.epsilon if self.difference == "forward" else 2 * self.epsilon)
        return {p: (ahead[p] - behind[p]) * factor.to(ahead[p]) for p in ahead if p in behind}

    def hypergradient(self, train_batch: Any, val_batch: Any, *, virtual_step: bool = True) -> list[Tensor]:
        """``∂_μ L_val(V', μ) − ξ·∇²_{μV} L_tr(V, μ)·v`` at the present V, which stays; nothing at all is changed.

        Args:
            train_batch: defines L_tr.
            val_batch: defines L_val.
            virtual_step: ``V' = V − ξ·∇_V(L_tr + γ·R)``, DARTS' unrolled step; False for ``V' = V``, which the Betty
                library takes.

        Returns:
            One tensor per magnitude, in the order and shapes of the upper's parameters.

        Raises:
            ValueError: a loss that is not a finite scalar, or a batch without labels.
        """
        train_batch, val_batch = self._on_device(train_batch), self._on_device(val_batch)
        before, noise = self._lower_values(), self._noise.present()
        passes = [TrainPass(lambda: self._loss(train_batch, "training"), RandomStreams(devices_of(self.model)))]
        there, magnitude_grads = before, {}
        if virtual_step or self.difference == "forward":
            with self._aside():
                train = self._backward(passes)
                if self.orthogonality > 0:
                    add_orthogonality_gradient(self._layers, self.orthogonality)
                finite("training", train)
                magnitude_grads = grads_of(self._magnitudes())
                if virtual_step:
                    steps, grads = self._step_sizes(), grads_of(self._directions())
                    there = {p: value - steps[p] * grads[p] if p in grads else value for p, value in before.items()}
        with moved(there):
            val, grads = self._validation(val_batch)
        finite("validation", val)
        second = self._second_order(grads, before, passes, magnitude_grads, noise)
        return self._difference(grads, second)

    def _difference(self, grads: Values, second: Values) -> list[Tensor]:
        """``∂_μ L_val − second`` per magnitude; either may be missing, where that loss does not depend on it."""
        parts = [(p, grads.get(p), second.get(p)) for p in self._magnitudes()]
        zeros = torch.zeros_like
        return [(zeros(p) if g is None else g) - (zeros(p) if s is None else s) for p, g, s in parts]

    # --- what others see ----------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Takes everything off the model. Idempotent; the levels are left as they are."""
        if self._watch is not None:
            self._watch.remove()
        self._layout.release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._watch is not None:
            self._watch.clear()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "seed": self._seed,
            "lower_steps": self._lower_steps,
            "train": None if self._train is None else self._train.state_dict(),
            "val": self._val.state_dict(),
            "retrain": self.retraining_state(),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        self._seed, self._lower_steps = state["seed"], state["lower_steps"]
        if self._train is not None and state["train"] is not None:
            self._train.load_state_dict(state["train"])
        self._val.load_state_dict(state["val"])
        self.load_retraining_state(state["phase"], state["retrain"])

    # --- passes ---------------------------------------------------------------------------------------------------

    def _backward(self, passes: list[TrainPass]) -> Tensor:
        """L_tr, or L_val, of the passes; its gradient replaces what is in `.grad`."""
        super().zero_grad()
        return torch.stack([one.backward() for one in passes]).sum()

    @contextmanager
    def _aside(self, seed: int = 0) -> Iterator[None]:
        with traceless(self.model, seed), self._watch.away() if self._watch else nullcontext():
            yield

    # --- parameters, looked up each time --------------------------------------------------------------------------

    def _directions(self) -> list[Tensor]:
        return list(self._step_sizes())

    def _step_sizes(self) -> dict[Tensor, Any]:
        """V and its ξ. The auxiliary of Bi-LoRA is not part of V but of the function that V descends."""
        return {
            p: group["lr"] if self.xi == "lr" else self.xi
            for group in self.lower.param_groups
            if not group.get("ascent")
            for p in group["params"]
        }

    def _lower_values(self) -> Values:
        return {p: p.detach().clone() for group in self.lower.param_groups for p in group["params"]}

    def _trained_layers(self) -> list[LoRALayer]:
        """PEFT's linear layers whose directions `lower` holds; none if γ = 0, which needs none."""
        if self.orthogonality == 0 or not is_peft(self.model):
            return []
        held = {id(p) for p in self._directions()}
        found = []
        for layer in lora_layers(self.model, self.adapter):
            names = frozenset(a.name for a in layer.all_adapters() if id(a.A_param) in held)
            if names:
                found.append(LoRALayer(layer.name, layer.module, layer.base, names))
        return found


def _check_form(xi: Any, unroll_steps: Any, difference: Any, epsilon: Any, orthogonality: Any) -> None:
    if xi != "lr":
        _check_number("xi", xi, "a finite number >= 0 or 'lr'")
    if not isinstance(unroll_steps, int) or unroll_steps < 1:
        raise ValueError(f"unroll_steps must be an integer >= 1, got {unroll_steps!r}")
    if difference not in ("central", "forward"):
        raise ValueError(f"difference must be 'central' or 'forward', got {difference!r}")
    _check_number("epsilon", epsilon)
    _check_number("orthogonality", orthogonality)
    if epsilon == 0:
        raise ValueError("epsilon must be > 0; to leave the second-order term out, set xi=0")


def _check_number(name: str, value: Any, expected: str = "a finite number >= 0") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
