"""BiDoRA: directions on the training split, magnitudes on the validation split, by real hypergradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..layers.bnb import hold_training_layout
from ..layers.stack import BaseNorms
from ..streams import RandomStreams, derived_seed, shared_seed
from ..wrapper import only_initialises, wrappers_of
from .data import to_device, two_splits
from .levels import directions_of, step_sizes
from .loop import LoopWatch
from .orthogonality import add_orthogonality_gradient
from .parameters import check_levels, dora_layers, update_correlation
from .passes import (
    LossPass,
    LowerPass,
    Values,
    average_gradients,
    batch_loss,
    begin_alike,
    copies,
    finite,
    frozen,
    grads_of,
    isolated,
    moved,
    norm_of,
    parameters_of,
    parts_of,
    together,
    undone_on_error,
    whole_model,
)
from .phase_two import TwoPhases


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


class BilevelOptimizer(TwoPhases):
    """Trains directions V on one dataloader and magnitudes μ on another, by gradients through the inner step.

    BiDoRA (arXiv:2410.09758, Eq. 6-9 and Algorithm 1; the difference is Eq. 8 of DARTS, arXiv:1806.09055) solves

        min_μ L_val(V*(μ), μ)    with    V*(μ) = argmin_V L_tr(V, μ) + γ·R(V)

    One iteration makes `unroll_steps` steps of `lower` on training batches, μ frozen, from V to V' in the last one, and
    then one step of `upper` with the hypergradient

        ∂_μ L_val(V', μ) − ξ·∇²_{μV} L_tr(V, μ)·v,    v = ∇_V L_val(V', μ)

    whose second term is a finite difference of ∂_μ L_tr around V, on the training batch just used, over ``e·v`` with
    ``e = epsilon/‖v‖``. Its passes see the same dropout as the lower pass and, if `lower` perturbs the model (any
    `OptimizerWrapper` that says so), the same perturbation: L_tr is the perturbed loss, and what makes up the
    perturbation is no part of V. L_val is that of the unperturbed model. R, which lacks μ, is in no difference.
    `flatlora.reference.bidora_hypergradient` is that in a few lines.

    PEFT treats DoRA's norm ``‖W0 + s·B·A‖`` as a constant in backward. ∂_μ is exact all the same, and the difference
    moves the norm along with V, so the second term is the exact derivative of ∂_μ L_tr along v. But v, as the gradient
    that made V', lacks the part through the norm: this is not the full derivative of ``L_val(V'(μ), μ)``.

    A loss or gradient that is not finite fails the step: the host reads the numbers of both levels at once, before the
    upper one moves. If that or anything else in a step fails, everything is as before `step()`, and the next call tries
    the same again: parameters, gradients, both optimizers' states and groups, random streams, positions in the data.
    What a base optimizer keeps outside of its `state` and `param_groups` can't be put back. Under Adam that takes
    copies of four times the trained parameters, in less than 1 % of a step's time.

    The random streams end a step as if its lower passes alone had run. Under bfloat16 rounding drowns the difference:
    keep A, B and μ in float32, as PEFT does, and compute in float32.

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
        xi: ξ ≥ 0, or ``"lr"`` for the learning rate of each of the lower's groups, which is DARTS' own ξ: its V' is one
            gradient step. 1, as in BiDoRA's code, takes V* by the implicit function theorem instead, with the identity
            for the inverse Hessian of L_tr. 0 drops the second term and its passes, which is a different method:
            alternating first-order updates.
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
        self.model = whole_model(checks.module(model))
        check_levels(lower, upper, self.model, adapter)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(model, batch), got {loss_fn!r}")
        self.loss_fn, self.adapter = loss_fn, adapter
        self.xi: float | Literal["lr"] = "lr" if xi == "lr" else checks.number("xi, if not 'lr',", xi)
        self.unroll_steps = checks.integer("unroll_steps", unroll_steps, 1)
        self.difference = checks.option("difference", difference, ("central", "forward"))
        self.epsilon = checks.number("epsilon", epsilon, above=0)  # to leave the second-order term out, one sets xi=0
        self.orthogonality = checks.number("orthogonality", orthogonality)
        self._layers = dora_layers(self.model, adapter, directions_of(lower), needed=self.orthogonality > 0)
        self._base_norms = BaseNorms()
        self._seed = shared_seed()
        self._train, self._val = two_splits(train_dataloader, val_dataloader, self._seed)
        begin_alike([*parameters_of(lower), *parameters_of(upper)])
        self._lower_steps = 0
        self._norms: dict[str, Tensor] = {}
        self._layout = hold_training_layout(self.model)
        self._watch = LoopWatch(self.model, upper, hooks=self._train is None)

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
        if closure is not None and self._train is not None:
            raise ValueError("step() runs the training batches itself; a closure needs train_dataloader=None")
        with undone_on_error(self.model, (self.lower, self.upper), (self._train, self._val), self._watch):
            if closure is not None:
                with torch.enable_grad():
                    closure()
            return self._iterate()

    def _iterate(self) -> BilevelStep:
        steps, norms = self._lower_steps, dict(self._norms)
        numbers: list[tuple[str, Tensor]] = []  # read together: each read would stall a GPU
        for _ in range(1 if self._train is None else self.unroll_steps):
            at = self._lower_pass(None if self._train is None else [self._pass(self._train.next(), "training")])
            norms["lower_grad_norm"] = norm_of(grads_of(at.V))
            numbers += [("training loss", at.loss), ("training gradient's norm", norms["lower_grad_norm"])]
            self.lower.step()  # V becomes V', along ∇_V (L_tr + γ·R)
            steps += 1
        reaches_upper = self._train is not None or steps % self.unroll_steps == 0
        if reaches_upper:
            loss, direct, v = self._val_pass(self._val.next(), steps)
            implicit = self._second_order(at, v)
            hypergradient = self._hypergradient(direct, implicit)
            for p, grad in hypergradient.items():
                p.grad = grad
            norms |= {"first_order_norm": norm_of(direct), "second_order_norm": norm_of(implicit)}
            norms["hypergradient_norm"] = norm_of(hypergradient)
            numbers += [("validation loss", loss), ("hypergradient's norm", norms["hypergradient_norm"])]
        values: list[Any] = finite(*numbers)
        if reaches_upper:
            self.upper.step()  # μ moves along its hypergradient
        else:
            values += [None, None]
        self._watch.clear()
        self._lower_steps, self._norms = steps, norms
        train_loss, lower_grad_norm, val_loss, upper_grad_norm = values[-4:]
        return BilevelStep(train_loss, val_loss, lower_grad_norm, upper_grad_norm)

    def _lower_pass(self, passes: list[LossPass] | None) -> LowerPass:
        """L_tr(V, μ) over the passes, or over those that the loop has made; ``∇_V (L_tr + γ·R)`` is in `.grad`."""
        if passes is None:
            passes, loss = self._watch.train_loss()
            loss = average_gradients(self.model, loss)
        else:
            # The forward difference subtracts ∂_μ of this very pass; the central one has no use for it.
            reused = self.difference == "forward" and self.xi != 0
            with nullcontext() if reused else frozen(parameters_of(self.upper)):
                loss = self._backward(passes)
        magnitude_grads = grads_of(parameters_of(self.upper))
        self.upper.zero_grad()
        add_orthogonality_gradient(self._layers, self.orthogonality)
        perturbations = [wrapper.current_perturbation() for wrapper in wrappers_of(self.lower)]
        return LowerPass(copies(directions_of(self.lower)), perturbations, passes, loss, magnitude_grads)

    def _val_pass(self, batch: Any, steps: int) -> tuple[Tensor, Values, Values]:
        """L_val(V', μ) of the unperturbed model after so many lower steps, ∂_μ of it, and ``v = ∇_V L_val``."""
        # Dropout in this pass draws from a seed of its own, or it would shift the stream of the lower passes.
        seed = derived_seed(self._seed, "validation", steps)
        lifted = together(wrapper.unperturbed() for wrapper in wrappers_of(self.lower))
        with isolated(self.model, self._watch, seed), lifted:
            loss = self._backward([self._pass(batch, "validation")])
            return loss, grads_of(parameters_of(self.upper)), grads_of(parameters_of(self.lower))

    def _second_order(self, at: LowerPass, v: Values) -> Values:
        """``ξ·∇²_{μV} L_tr(V, μ)·v`` by finite difference around V; nothing where ξ is 0.

        ξ may differ between groups, so the difference is taken along ``u = ξ·v``, at ``V ± epsilon·u/‖u‖``.
        """
        if self.xi == 0:
            return {}
        xi = step_sizes(self.lower, self.xi)
        u = {p: xi[p] * v[p] for p in at.V if p in v}
        length = norm_of(u)
        e = torch.where(length > 0, self.epsilon / length, 0.0)  # v may vanish, and so may a learning rate

        def magnitude_grads(e: Tensor) -> Values:
            """``∂_μ L_tr(V + e·u, μ)``"""
            with moved({p: value + e.to(value) * u[p] if p in u else value for p, value in at.V.items()}):
                self._backward(at.passes)
            return grads_of(parameters_of(self.upper))

        as_then = together(w.perturbed_as(p) for w, p in zip(wrappers_of(self.lower), at.perturbations, strict=True))
        with isolated(self.model, self._watch), as_then, frozen(parameters_of(self.lower)):
            ahead = magnitude_grads(e)
            behind = at.magnitude_grads if self.difference == "forward" else magnitude_grads(-e)
        per_e = length / (self.epsilon if self.difference == "forward" else 2 * self.epsilon)
        return {p: (ahead[p] - behind[p]) * per_e.to(ahead[p]) for p in ahead if p in behind}

    def _hypergradient(self, direct: Values, implicit: Values) -> Values:
        """``∂_μ L_val(V', μ) − ξ·∇²_{μV} L_tr(V, μ)·v`` of every magnitude, 0 of one that a loss does not have."""

        def of(p: Tensor, values: Values) -> Tensor:
            return values[p] if p in values else torch.zeros_like(p)

        return {p: of(p, direct) - of(p, implicit) for p in parameters_of(self.upper)}

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
        with isolated(self.model, self._watch):
            at = self._lower_pass(passes)
            xi, grads = step_sizes(self.lower, self.xi), grads_of(at.V)
        after = {p: value - xi[p] * grads[p] if p in grads and virtual_step else value for p, value in at.V.items()}
        with moved(after):
            loss, direct, v = self._val_pass(val_batch, self._lower_steps)
        finite(("training loss", at.loss), ("validation loss", loss))
        return list(self._hypergradient(direct, self._second_order(at, v)).values())

    def retrain_gradients(self, batch: Any) -> Tensor:
        loss = self._backward([self._pass(batch, "training")])
        add_orthogonality_gradient(self._layers, self.orthogonality)
        return loss

    def _pass(self, batch: Any, which: str) -> LossPass:
        """The loss of a batch from where the random streams stand now; errors say `which` batch it is."""
        *_, devices = parts_of(self.model)
        batch = to_device(batch, devices[0])
        return LossPass(lambda: batch_loss(self.model, batch, which, self.loss_fn), RandomStreams(devices))

    def _backward(self, passes: list[LossPass]) -> Tensor:
        """L_tr, or L_val, of the passes over all ranks; its gradient replaces what is in `.grad`."""
        super().zero_grad()
        return average_gradients(self.model, torch.stack([one.backward() for one in passes]).sum())

    def metrics(self) -> dict[str, Tensor]:
        """Norms over all parameters of a level, in units of the loss per unit of these, and a correlation.

        ``lower_grad_norm``: ``‖∇_V (L_tr + γ·R)‖`` of the last lower step.
        ``hypergradient_norm``: of the last upper step, and of its terms ``first_order_norm``, the direct one, and
        ``second_order_norm``, the implicit one through V', ξ included.
        ``update_correlation``: Pearson's r of the adapters' ΔM and ΔD, how far μ and V are from the pretrained weights
        (DoRA, arXiv:2402.09353, Eq. 3-4); from −1, as full fine-tuning tends to, to 1; 0 where one of them is constant.
        """
        found = update_correlation(self._layers, self._base_norms) if self._lower_steps else None
        return dict(self._norms) if found is None else {**self._norms, "update_correlation": found}

    def remove(self) -> None:
        """Takes everything off the model. Idempotent; the levels are left as they are."""
        self._watch.remove()
        self._layout.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_watch": None}  # a copy watches its own model

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch = LoopWatch(self.model, self.upper, hooks=self._train is None)
        self._watch.on = self.phase == 1

    def zero_grad(self, set_to_none: bool = True, **kwargs: Any) -> None:
        super().zero_grad(set_to_none, **kwargs)
        self._watch.clear()

    def method_state(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "seed": self._seed,
            "lower_steps": self._lower_steps,
            "train": None if self._train is None else self._train.state_dict(),
            "val": self._val.state_dict(),
            "retrain": self.phase_state(),
        }

    def check_method_state(self, state: dict[str, Any]) -> None:
        checks.state_fields(self._kind, state, "phase", "seed", "lower_steps", "train", "val", "retrain")
        checks.integer("seed in the state_dict", state["seed"], 0)
        checks.integer("lower_steps in the state_dict", state["lower_steps"], 0)
        if self._train is not None and state["train"] is not None:
            self._train.check_state_dict(state["train"])
        self._val.check_state_dict(state["val"])
        self.check_phase(state["phase"], state["retrain"])

    def load_method_state(self, state: dict[str, Any] | None) -> None:
        assert state is not None  # `load_state_dict` refuses a checkpoint without it
        self._seed, self._lower_steps, self._norms = state["seed"], state["lower_steps"], {}
        if self._train is not None and state["train"] is not None:
            self._train.load_state_dict(state["train"])
        self._val.load_state_dict(state["val"])
        self.load_phase(state["phase"], state["retrain"])
