"""BiDoRA: directions on the training split, magnitudes on the validation split, by real hypergradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..layers.bnb import hold_training_layout
from ..streams import derived_seed, shared_seed
from ..wrapper import chain, only_initialises
from .arguments import check_levels, check_options, warn_of_shared_data
from .data import Batches
from .levels import TwoLevels, directions_of, step_sizes
from .loop import LoopWatch
from .orthogonality import add_orthogonality_gradient
from .parameters import trained_layers
from .passes import LossPass, Values, batch_pass, finite, frozen, grads_of, moved, norm_of, parameters_of, traceless
from .perturbations import current_perturbations, perturbed_as, unperturbed
from .phase_two import PhaseTwo
from .ranks import average_gradients, begin_alike, whole_model
from .records import BilevelStep, Hypergradient, LowerPoint, TrainLoss, ValLoss
from .snapshot import undone_on_error
from .updates import Updates

__all__ = ["BilevelOptimizer", "BilevelStep"]


class BilevelOptimizer(TwoLevels):
    """Trains directions V on one dataloader and magnitudes μ on another, by gradients through the inner step.

    BiDoRA (arXiv:2410.09758, Eq. 6-9 and Algorithm 1; the difference is Eq. 8 of DARTS, arXiv:1806.09055) solves

        min_μ L_val(V*(μ), μ)    with    V*(μ) = argmin_V L_tr(V, μ) + γ·R(V)

    One iteration makes `unroll_steps` steps of `lower` on training batches, μ frozen, from V to V' in the last one, and
    then one step of `upper` with the hypergradient

        ∂_μ L_val(V', μ) − ξ·∇²_{μV} L_tr(V, μ)·v,    v = ∇_V L_val(V', μ)

    whose second term is a finite difference of ∂_μ L_tr around V, on the training batch just used, over ``e·v`` with
    ``e = epsilon/‖v‖``. The passes it subtracts see the same dropout as the lower pass and, if `lower` perturbs the
    model (any `OptimizerWrapper` that says so), the same perturbation: L_tr is the perturbed loss, and what makes up
    the perturbation is no part of V. L_val is that of the unperturbed model. R, which lacks μ, is in no difference.

    PEFT treats DoRA's norm ``‖W0 + s·B·A‖`` as a constant in backward. ∂_μ is exact all the same, and the difference
    moves the norm along with V: the second term is the exact derivative of ∂_μ L_tr along v. But v lacks the part of
    ∇_V L_val through the norm, and so does the gradient that made V': the hypergradient is that of the loss with v
    so defined, not the full derivative of ``L_val(V'(μ), μ)``.

    The random streams end a step as if its lower passes alone had run. If anything in a step fails, or a loss is not
    finite, everything is as before `step()`: parameters, gradients, both optimizers' states and groups, random streams
    and positions in the data, so that the next call tries the same again. What a base optimizer keeps outside of its
    `state` and `param_groups` can't be put back. Under bfloat16 rounding drowns the difference: keep A, B and μ in
    float32, as PEFT does, and compute in float32.

    Several processes each run their share of every batch, as a `DistributedSampler` in each loader (it is told the
    epoch) deals it out. Losses and all gradients are averaged over them; they begin with rank 0's parameters. DDP need
    not wrap the model; for a loop of your own that has it do so, clip V alone.

    Args:
        lower: a built optimizer of the directions, and of a new head if there is one.
        upper: a built optimizer of the magnitudes.
        model: the model. Without PEFT adapters any two-level problem will do, whatever `lower` and `upper` hold.
        train_dataloader: batches of the lower level, cycled for ever and reshuffled each epoch. None if another's loop,
            such as the Hugging Face Trainer, runs forward and backward itself and calls `step()`; see below.
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
            empty dataloader, a bad number; from `step()` a loss that is no finite scalar, a batch without labels.
        TypeError: an argument of the wrong type.
        RuntimeError: a sharded model.

    Example:
        >>> lower = torch.optim.AdamW(direction_parameters(model), lr=5e-5, weight_decay=0.1)
        >>> upper = torch.optim.AdamW(magnitude_parameters(model), lr=5e-5, weight_decay=0.1)
        >>> optimizer = BilevelOptimizer(lower, upper, model, train_dataloader, val_dataloader)
        >>> losses = [optimizer.step() for _ in range(1000)]
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
        model = whole_model(checks.module(model))
        check_options(loss_fn, xi, unroll_steps, difference, epsilon, orthogonality)
        check_levels(lower, upper, model, adapter)
        warn_of_shared_data(train_dataloader, val_dataloader)
        self.model, self.loss_fn, self.adapter, self.difference = model, loss_fn, adapter, difference
        self.xi: float | Literal["lr"] = "lr" if isinstance(xi, str) else float(xi)
        self.unroll_steps, self.epsilon, self.orthogonality = int(unroll_steps), float(epsilon), float(orthogonality)
        self.last_step: BilevelStep | None = None  # for loops that do not hand out what step() returns
        self._seed = shared_seed()
        begin_alike([*parameters_of(lower), *parameters_of(upper)])
        self._train = None if train_dataloader is None else Batches(train_dataloader, "train_dataloader", self._seed)
        self._val = Batches(val_dataloader, "val_dataloader", self._seed)
        self._lower_steps = 0
        self._norms: dict[str, Tensor] = {}
        layers = trained_layers(model, adapter, directions_of(lower), needed=orthogonality > 0)
        self._layers = layers if orthogonality > 0 else []
        self._updates = Updates(layers)
        self._layout = hold_training_layout(model)
        self._watch = LoopWatch(model, upper) if self._train is None else None
        self._phase_two = PhaseTwo(self.lower, self.upper, model, adapter, self._watch)

    # --- the method -----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> BilevelStep:  # type: ignore[override]
        """One iteration; with ``train_dataloader=None`` one lower step, and every `unroll_steps`-th time an upper one.

        The gradients that the levels took stay in `.grad`.

        Args:
            closure: forward and backward of the training batch, if the loop passes one; ``train_dataloader=None`` only.

        Raises:
            ValueError: a loss that is not a finite scalar, or a batch without labels. Everything is as before.
            RuntimeError: the second phase has begun, or the loop has given no gradients.
        """
        if only_initialises(self):
            return self.make_states()
        if self.phase == 2:
            raise RuntimeError("retrain() has begun the second phase and frozen the magnitudes; call retrain() again")
        if closure is not None and self._watch is None:
            raise ValueError("step() runs the training batches itself; a closure needs train_dataloader=None")
        lower_steps, norms = self._lower_steps, dict(self._norms)
        try:
            with undone_on_error(self.model, (self.lower, self.upper), (self._train, self._val), self._watch):
                if closure is not None:
                    with torch.enable_grad():
                        closure()
                self.last_step = self._iterate()
        except BaseException:
            self._lower_steps, self._norms = lower_steps, norms
            raise
        if self._watch is not None:
            self._watch.clear()
        return self.last_step

    def _iterate(self) -> BilevelStep:
        for _ in range(self.unroll_steps if self._watch is None else 1):
            at = self._lower_loss()
            seen = self._lower_step(at)
        if self._watch is not None and self._lower_steps % self.unroll_steps:
            return seen
        val = self._val_loss(self._val.next())
        return self._upper_step(seen, val, self._hypergradient(at, val))

    def _lower_loss(self) -> LowerPoint:
        """L_tr(V, μ), with ∇_V of it in `.grad`."""
        if self._train is not None:
            return self._here(self._take([self._pass(self._train.next(), "training")]))
        passes, value = self._watch.train_loss()  # type: ignore[union-attr]  # the loop has been through it
        return self._here(self._seen(passes, average_gradients(self.model, value)))

    def _take(self, passes: list[LossPass]) -> TrainLoss:
        # The forward difference subtracts ∂_μ of this very pass; the central one has no use for it.
        wanted = self.difference == "forward" and self.xi != 0
        with nullcontext() if wanted else frozen(self._magnitudes()):
            return self._seen(passes, self._backward(passes))

    def _seen(self, passes: list[LossPass], value: Tensor) -> TrainLoss:
        loss = TrainLoss(passes, value, grads_of(self._magnitudes()))
        self.upper.zero_grad()
        return loss

    def _here(self, loss: TrainLoss) -> LowerPoint:
        return LowerPoint(directions_of(self.lower), current_perturbations(self.lower), loss)

    def _lower_step(self, at: LowerPoint) -> BilevelStep:
        """V becomes V', by a step of `lower` along ``∇_V (L_tr + γ·R)``."""
        add_orthogonality_gradient(self._layers, self.orthogonality)
        self._norms["lower_grad_norm"] = norm = norm_of(grads_of(at.V))
        train_loss, grad_norm = finite("training", at.loss.value, norm)
        self.lower.step()
        self._lower_steps += 1
        return BilevelStep(train_loss, None, grad_norm, None)

    def _val_loss(self, batch: Any) -> ValLoss:
        """L_val(V', μ) of the unperturbed model, and its gradients."""
        # Dropout in this pass draws from a seed of its own, or it would shift the stream of the lower passes.
        seed = derived_seed(self._seed, "validation", self._lower_steps)
        with traceless(self.model, seed, self._watch), unperturbed(chain(self.lower)):
            value = self._backward([self._pass(batch, "validation")])
            return ValLoss(value, grads_of(self._magnitudes()), grads_of(parameters_of(self.lower)))

    def _upper_step(self, seen: BilevelStep, val: ValLoss, hypergradient: Hypergradient) -> BilevelStep:
        """μ takes a step of `upper` along its hypergradient."""
        for p in self._magnitudes():
            p.grad = hypergradient.of(p)
        norm = norm_of(grads_of(self._magnitudes()))
        val_loss, grad_norm = finite("validation", val.value, norm)
        self.upper.step()
        self._norms |= {"hypergradient_norm": norm, **hypergradient.norms()}
        return replace(seen, val_loss=val_loss, upper_grad_norm=grad_norm)

    def _hypergradient(self, at: LowerPoint, val: ValLoss) -> Hypergradient:
        """``∂_μ L_val(V', μ) − ξ·∇²_{μV} L_tr(V, μ)·v``"""
        return Hypergradient(val.magnitude_grads, self._second_order(at, val.v) if self.xi != 0 else {})

    def _second_order(self, at: LowerPoint, v: Values) -> Values:
        """``ξ·∇²_{μV} L_tr(V, μ)·v`` by finite difference around V.

        ξ may differ between groups, so the difference is taken along ``u = ξ·v``, at ``V ± epsilon·u/‖u‖``.
        """
        V, xi = at.V, step_sizes(self.lower, self.xi)
        u = {p: xi[p] * v[p] for p in V if p in v}
        length = norm_of(u)
        e = torch.where(length > 0, self.epsilon / length, 0.0)  # v may vanish, and so may a learning rate

        def magnitude_grads(e: Tensor) -> Values:
            """``∂_μ L_tr(V + e·u, μ)``"""
            with moved({p: value + e.to(value) * u[p] if p in u else value for p, value in V.items()}):
                self._backward(at.loss.passes)
            return grads_of(self._magnitudes())

        aside, as_then = traceless(self.model, watch=self._watch), perturbed_as(self.lower, at.perturbations)
        with aside, as_then, frozen(parameters_of(self.lower)):
            ahead = magnitude_grads(e)
            behind = at.loss.magnitude_grads if self.difference == "forward" else magnitude_grads(-e)
        per_e = length / (self.epsilon if self.difference == "forward" else 2 * self.epsilon)
        return {p: (ahead[p] - behind[p]) * per_e.to(ahead[p]) for p in ahead if p in behind}

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
        passes = [self._pass(train_batch, "training")]
        with traceless(self.model, watch=self._watch):
            at = self._here(self._take(passes))
            add_orthogonality_gradient(self._layers, self.orthogonality)
            finite("training", at.loss.value)
            xi, grads = step_sizes(self.lower, self.xi), grads_of(at.V)
        after = {p: value - xi[p] * grads[p] if p in grads and virtual_step else value for p, value in at.V.items()}
        with moved(after):
            val = self._val_loss(val_batch)
        finite("validation", val.value)
        return list(map(self._hypergradient(at, val).of, self._magnitudes()))

    # --- phase two ------------------------------------------------------------------------------------------------

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
        return self._phase_two.run(dataloader, steps, optimizer, scheduler, self._seed, self._retrain_backward)

    def _retrain_backward(self, batch: Any) -> Tensor:
        """``∇_V (L + γ·R)`` into `.grad`; returns L."""
        loss = self._backward([self._pass(batch, "training")])
        add_orthogonality_gradient(self._layers, self.orthogonality)
        return loss

    @property
    def phase(self) -> int:
        """1, or 2 once `retrain` has begun."""
        return self._phase_two.phase

    # --- what others see ------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Tensor]:
        """Norms over all parameters of a level, in units of the loss per unit of these, and a correlation.

        ``lower_grad_norm``: ``‖∇_V (L_tr + γ·R)‖`` of the last lower step.
        ``hypergradient_norm``: of the last upper step, and of its terms ``first_order_norm``, the direct one, and
        ``second_order_norm``, the implicit one through V', ξ included.
        ``update_correlation``: of layers' ΔM and ΔD, see `Updates`; from −1, as full fine-tuning tends to, to 1.
        """
        return {**self._norms, **(self._updates.metrics() if self._lower_steps else {})}

    def remove(self) -> None:
        """Takes everything off the model. Idempotent; the levels are left as they are."""
        if self._watch is not None:
            self._watch.remove()
        self._layout.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_watch": None if self._watch is None else True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state["_watch"]:  # a copy watches its own model
            self._watch = self._phase_two.watch = LoopWatch(self.model, self.upper)
            self._watch.on = self.phase == 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._watch is not None:
            self._watch.clear()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "seed": self._seed,
            "lower_steps": self._lower_steps,
            "train": None if self._train is None else self._train.state_dict(),
            "val": self._val.state_dict(),
            "retrain": self._phase_two.state_dict(),
        }

    def check_method_state(self, state: dict[str, Any]) -> None:
        checks.state_fields(type(self).__name__, state, "phase", "seed", "lower_steps", "train", "val", "retrain")
        checks.integer("seed in the state_dict", state["seed"], 0)
        checks.integer("lower_steps in the state_dict", state["lower_steps"], 0)
        if self._train is not None and state["train"] is not None:
            self._train.check_state_dict(state["train"])
        self._val.check_state_dict(state["val"])
        self._phase_two.check_state_dict(state["phase"], state["retrain"])

    def load_method_state(self, state: dict[str, Any] | None) -> None:
        assert state is not None  # `load_state_dict` refuses a checkpoint without it
        self._seed, self._lower_steps, self._norms = state["seed"], state["lower_steps"], {}
        if self._train is not None and state["train"] is not None:
            self._train.load_state_dict(state["train"])
        self._val.load_state_dict(state["val"])
        self._phase_two.load_state_dict(state["phase"], state["retrain"])

    # --- passes ---------------------------------------------------------------------------------------------------

    def _pass(self, batch: Any, which: str) -> LossPass:
        return batch_pass(self.model, batch, which, self.loss_fn)

    def _backward(self, passes: list[LossPass]) -> Tensor:
        """L_tr, or L_val, of the passes over all ranks; its gradient replaces what is in `.grad`."""
        super().zero_grad()
        return average_gradients(self.model, torch.stack([one.backward() for one in passes]).sum())

    def _magnitudes(self) -> list[Tensor]:
        return parameters_of(self.upper)
