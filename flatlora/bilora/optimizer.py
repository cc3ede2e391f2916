"""Bi-LoRA: an auxiliary adapter ascends while the primary descends, so sharpness-aware training costs one pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..perturbation.bypass import held_ids
from ..perturbation.optimizer import PerturbingOptimizer, trainable, trained_by
from ..perturbation.rise import check_rise
from ..wrapper import saved_groups, wrappers_of
from .auxiliary import (
    AuxiliarySource,
    attach_auxiliary,
    auxiliaries_of,
    detach_auxiliary,
    named_triples,
    shapes_of,
    total_norm,
)

logger = logging.getLogger("flatlora")


class BiLoRAOptimizer(PerturbingOptimizer):
    """Wraps any optimizer; parameter groups marked ``"ascent": True`` climb the loss that the others descend.

    Bi-LoRA (arXiv:2508.19564, Eq. 7-9) solves, with one forward and one backward for both sides' gradients,

        min over (B1, A1), max over (B2, A2) and c ≤ ρ, of L(W0 + s1·B1·A1 + s2·B2·A2), c = sqrt(Σ_layers ‖s2·B2·A2‖_F²)

    A step turns the sign of the ascent groups' gradients (8-bit optimizers have no `maximize`), steps the base
    optimizer, turns the signs back, and clips all auxiliaries together: if ``c > ρ``, every B2 and A2 is multiplied by
    ``sqrt(ρ/c)``. `flatlora.reference.bilora_step` is that in a few lines. The auxiliary is a weak adversary: it raised
    the next batch's loss by a fiftieth of what that batch's own gradient does at the same norm (`examples/results.md`).

    Gradient norms and clipping are those of plain LoRA: until the step the auxiliary's gradients are scaled by 2⁻²⁰,
    but for those of float16 auxiliaries and of your own layers. A reduction in float16 (DDP's `fp16_compress_hook`)
    would lose them and leave the auxiliary zero, as ``metrics()["perturbation_to_rho"]`` shows: reduce in bfloat16 or
    float32. Opacus raises at the first step, as it finds no per-sample gradients of the auxiliary.

    Args:
        optimizer: the built base optimizer, with at least one ascent group. An ascent group has its own `lr` and
            should have ``"weight_decay": 0.0``.
        model: the model that `attach_auxiliary` was called on, or one with auxiliaries of its own.
        rho: ρ, the largest total Frobenius norm of the perturbation.
        auxiliary: for two-branch layers of your own, the ``(A2 (r, n), B2 (m, r), scaling)`` of each; your layers then
            apply them themselves, in train mode alone. By default those that `attach_auxiliary` made.
        perturb_no_grad: as in `GGPOOptimizer`.

    Raises:
        ValueError: no ascent group; an ascent group that holds a parameter of no auxiliary, or leaves out one of an
            auxiliary, or does not `maximize` as the adapters' groups do; ρ not above 0.
        TypeError: `optimizer` is not an optimizer instance.

    Example:
        >>> aux = attach_auxiliary(model, r=8)
        >>> ascent = {"params": aux, "ascent": True, "weight_decay": 0.0}
        >>> base = bnb.optim.AdamW8bit([{"params": primary}, ascent], lr=3e-4)
        >>> optimizer = BiLoRAOptimizer(base, model, rho=0.05)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        rho: float = 0.05,
        auxiliary: Sequence[tuple[Tensor, Tensor, float]] | None = None,
        perturb_no_grad: bool = False,
    ):
        super().__init__(optimizer)
        self._rho = checks.number("rho", rho, above=0)
        self._model, self._no_grad = checks.module(model), perturb_no_grad
        self._triples = None if auxiliary is None else named_triples(model, auxiliary)
        self._negated: tuple[list[Tensor], float] = [], 1.0  # gradients, and the factor that undoes it
        self._clips: list[Tensor | int] = [0, 0]  # steps that ρ clipped, counted on the device, and all
        self._check_groups()
        if auxiliary is None:
            self.reattach()

    def reattach(self) -> None:
        ours = auxiliaries_of(self._model)
        for auxiliary in ours:
            if auxiliary.attachment is not None:
                auxiliary.attachment.remove()
                auxiliary.attachment = None
        source = AuxiliarySource(ours, scale_grads=True)
        source.rise = source.rise if self._source is None else self._source.rise  # of the optimizer that was copied
        source.no_grad = self._no_grad
        held = held_ids(True, self.base_optimizer)
        for layer in source.layers.values():
            names = {a.name for a in layer.all_adapters() if not held.isdisjoint(map(id, a.params))}
            layer.names = frozenset(names) or layer.names  # another optimizer may hold the primary
        self.attach(source)

    def remove(self) -> None:
        """Takes the auxiliaries off the model. Idempotent; the optimizer goes on with the rest of its parameters."""
        if self._attached:
            detach_auxiliary(self._model)
        super().remove()

    @property
    def rho(self) -> float:
        """ρ; a change is felt at the next step."""
        return self._rho

    @rho.setter
    def rho(self, value: float) -> None:
        self._rho = checks.number("rho", value, above=0)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        optimizer_cls: Callable[..., Optimizer],
        *,
        params: Iterable[Any] | None = None,
        auxiliary_lr: float | None = None,
        r: int = 8,
        alpha: float | None = None,
        rho: float = 0.05,
        adapter: str | Iterable[str] | None = None,
        seed: int | None = None,
        perturb_no_grad: bool = False,
        **kwargs: Any,
    ) -> BiLoRAOptimizer:
        """Attaches an auxiliary and builds the optimizer over it and every parameter that requires a gradient.

        Args:
            model: the model with adapters.
            optimizer_cls: makes the base: ``optimizer_cls(groups, **kwargs)``. The auxiliary's group is the last, with
                no weight decay.
            params: the primary's parameters or parameter groups; by default one group of all.
            auxiliary_lr: by default the ``lr`` among `kwargs`.
            r, alpha, adapter, seed: as in `attach_auxiliary`. If anything fails, the auxiliary is taken off again.
        """
        checks.optimizer_cls(optimizer_cls)
        own_lr = {} if auxiliary_lr is None else {"lr": checks.number("auxiliary_lr", auxiliary_lr)}
        primary = list(trainable(model) if params is None else params)
        groups = primary if primary and isinstance(primary[0], dict) else [{"params": primary}]
        ascending = attach_auxiliary(model, r, alpha=alpha, adapter=adapter, seed=seed)
        try:
            ascent = {"params": ascending, "ascent": True, "weight_decay": 0.0, **own_lr}
            base = optimizer_cls([*groups, ascent], **kwargs)
            trained_by(model, adapter, base)  # raises where nothing that is to descend is trained
            return cls(base, model, rho=rho, perturb_no_grad=perturb_no_grad)
        except BaseException:
            detach_auxiliary(model)
            raise

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """As the base optimizer's; gradients are as they were for everyone but its update, whatever it raises."""

        def evaluate() -> Any:  # the gradients are new at each evaluation
            assert closure is not None
            self._undo_negation()
            loss = closure()
            self._negate()
            return loss

        if self._triples is not None and not self._clips[1]:
            self.check_first_step()
        held, ours = {id(p) for p in self._ascending()}, {id(p) for p in self.perturbation_parameters()}
        if self._attached and held != ours and not self._watch.holds_foreign_tensors():
            self._check_groups()  # or the auxiliary would not ascend
        handles = self._negate_within_hooks() if closure is None else []
        try:
            return super().step(None if closure is None else evaluate, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            self._undo_negation()

    def _ascending(self) -> list[Tensor]:
        return [p for group in self.param_groups if group.get("ascent") for p in group["params"]]

    def _negate_within_hooks(self) -> list[Any]:
        """Negates the ascent gradients for the base's update alone, not for step hooks that others put around it."""
        base: Any = next(reversed([self, *wrappers_of(self.base_optimizer)])).base_optimizer
        if not getattr(type(base).step, "hooked", False):  # it has no step hooks
            self._negate()
            return []
        depth = 0  # a class whose `step` calls its parent's runs the hooks around both

        def before(*_: Any) -> None:
            nonlocal depth
            depth += 1
            if depth == 1:
                self._negate()

        def after(*_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                self._undo_negation()

        last_before, first_after = base.register_step_pre_hook(before), base.register_step_post_hook(after)
        base._optimizer_step_post_hooks.move_to_end(first_after.id, last=False)
        return [last_before, first_after]

    def before_step(self) -> None:
        super().before_step()
        if self._attached and self._source.passes and all(p.grad is None for p in self.perturbation_parameters()):
            self._watch.warn_once(
                "auxiliary",
                "step() found no gradient of the auxiliary, which stays as it is: gradients were taken of others, "
                "as by torch.autograd.grad or backward(inputs=...)",
            )

    @torch.no_grad()
    def after_step(self) -> None:
        self._undo_negation()
        if self._source is not None:
            super().after_step()
        triples = self._auxiliaries()
        if not triples:  # they have been detached
            return
        norm = total_norm(triples)  # compared on the device: reading it would stall the host at every step
        factors = [p for A, B, _ in triples.values() for p in (A, B)]
        below = 1 - max(torch.finfo(p.dtype).eps for p in factors)  # or rounding could leave the norm above ρ
        clipped, steps = self._clips
        self._clips = [clipped + (norm > self.rho), steps + 1]
        factor = torch.where(norm > self.rho, (self.rho / norm).sqrt() * below, 1.0)
        for device in {p.device for p in factors}:
            torch._foreach_mul_([p for p in factors if p.device == device], factor.to(device))

    @torch.no_grad()
    def _negate(self) -> None:
        grads = [p.grad for p in self._ascending() if p.grad is not None]
        scale = 1.0 if self._source is None else self._source.grad_scale
        self._negated = grads, -scale
        if grads:
            torch._foreach_mul_(grads, -1 / scale)

    @torch.no_grad()
    def _undo_negation(self) -> None:
        grads, factor = self._negated
        self._negated = [], 1.0
        if grads:
            torch._foreach_mul_(grads, factor)

    @torch.no_grad()
    def perturbation_norm(self) -> float:
        """``sqrt(Σ_layers ‖s2·B2·A2‖_F²)`` at present; never above ρ after a step."""
        return float(total_norm(self._auxiliaries()))

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """A rise of the loss, and two numbers without a unit, from 0 to 1.

        ``loss_rise``: how far the auxiliary raised the loss of the last step, to first order at the perturbed point,
        ``Σ_layers ⟨B2, ∂L/∂B2⟩`` over its micro-batches, in the units of the loss that was backpropagated; of this
        rank's share of the data. Not known of auxiliaries that your own layers apply.
        ``perturbation_to_rho``: ``sqrt(Σ_layers ‖s2·B2·A2‖_F²)`` over ρ, of the layers that the last step's passes went
        through.
        ``clipped_share``: the share of steps, since this optimizer was built, that clipped it.
        """
        if not (auxiliaries := self._auxiliaries()):
            return super().metrics()
        source, (clipped, steps) = self._source, self._clips
        acted = {n: one for n, one in auxiliaries.items() if source is None or n in source.acted or n in source.passes}
        norm = total_norm(acted or auxiliaries) * bool(acted)
        share = torch.as_tensor(clipped, dtype=norm.dtype, device=norm.device) / max(steps, 1)
        rise = {} if source is None else {"loss_rise": source.rise.value}
        return self._with_inner({**rise, "perturbation_to_rho": norm / self.rho, "clipped_share": share})

    def perturbation_parameters(self) -> list[Tensor]:
        return [p for A, B, _ in self._auxiliaries().values() for p in (A, B)]

    def current_perturbation(self) -> list[Tensor]:
        """The values of the auxiliaries' parameters."""
        return [p.detach().clone() for p in self.perturbation_parameters()]

    @contextmanager
    def perturbed_as(self, perturbation: list[Tensor]) -> Iterator[None]:
        """Within the context the auxiliaries have these values."""
        params, values = self.perturbation_parameters(), self.current_perturbation()
        try:
            _assign(params, perturbation)
            with super().perturbed_as(None):  # each layer's own parameters
                yield
        finally:
            _assign(params, values)

    def unperturbed(self) -> AbstractContextManager[None]:
        return self.perturbed_as([torch.zeros_like(p) for p in self.perturbation_parameters()])

    def _auxiliaries(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        if self._triples is not None:
            return self._triples
        # Its source holds the modules while they are attached, and finding them in the model takes a while.
        found = self._source.auxiliaries.values() if self._attached else auxiliaries_of(self._model)
        return {one.layer.name: (one.A, one.B, one.scaling) for one in found}

    def groups_changed(self) -> None:
        if self._triples is not None or self._attached:  # or it goes on as its base
            self._check_groups()
        if self._watch is not None:
            self._watch.note_groups(all_trained=True)

    def drop_parameters(self, params: set[int]) -> None: ...  # its layers do not depend on the groups

    def check_first_step(self) -> None:
        ours = {id(p) for p in self.perturbation_parameters()}
        foreign = self._watch is None or self._watch.holds_foreign_tensors()
        if foreign and not ours <= held_ids(True, self.base_optimizer):
            self.refuse_foreign_tensors()  # ρ does not bound these

    def _check_groups(self) -> None:
        auxiliaries = self._auxiliaries()
        ours = {id(p): name for name, (A, B, _) in auxiliaries.items() for p in (A, B)}
        ascent = [group for group in self.param_groups if group.get("ascent")]
        if not auxiliaries:
            raise ValueError(
                f"{type(self._model).__name__} has no auxiliary; call attach_auxiliary(model) first, or pass "
                "auxiliary=[(A, B, scaling), ...] for layers of your own"
            )
        if not ascent:
            raise ValueError(
                f"none of the {len(self.param_groups)} parameter groups ascends; put the auxiliary's parameters in one "
                'with "ascent": True: optimizer_cls([{"params": primary}, {"params": aux, "ascent": True}])'
            )
        held = {id(p): tuple(p.shape) for p in self._ascending()}
        if foreign := [shape for key, shape in held.items() if key not in ours]:
            raise ValueError(
                f"the ascent groups hold {len(foreign)} parameters of no auxiliary (first shape: {foreign[0]}); only "
                "what attach_auxiliary returned may ascend"
            )
        if missing := sorted({name for key, name in ours.items() if key not in held}):
            raise ValueError(
                f"the auxiliary of {len(missing)} layers is in no ascent group (first: {missing[0]!r}); pass all that "
                "attach_auxiliary returned"
            )
        adapters = [a for one in auxiliaries_of(self._model) for a in one.layer.all_adapters()]
        beside = {id(p) for adapter in adapters for p in adapter.params}
        theirs = [group for group in self.param_groups if not beside.isdisjoint(map(id, group["params"]))]
        if len({bool(group.get("maximize")) for group in [*ascent, *theirs]}) > 1:
            raise ValueError(
                "maximize is on in some of the ascent groups and the adapters' groups, and off in others; give all the "
                "same, as the auxiliary's gradients are turned in any case"
            )

    def method_state(self) -> dict[str, Any]:
        # With the auxiliary, as a saved adapter leaves it out.
        ours = auxiliaries_of(self._model) if self._triples is None else []
        ranks = {one.layer.name: one.layer.ranks() for one in ours}
        layers = {
            name: {"A": A.detach(), "B": B.detach(), "scaling": scaling, "ranks": ranks.get(name, {})}
            for name, (A, B, scaling) in self._auxiliaries().items()
        }
        rise = {} if self._source is None else {"rise": self._source.rise.state()}
        return {"rho": self.rho, "layers": layers, **rise}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().check_state_dict(state_dict)
        groups = saved_groups(state_dict) or [], self.param_groups
        theirs, ours = ([bool(group.get("ascent")) for group in of] for of in groups)
        if theirs != ours:
            raise ValueError(
                f"the groups of the state_dict ascend as {theirs}, this optimizer's as {ours}; load a state_dict that "
                "this class wrote, or train the auxiliary afresh"
            )

    def check_method_state(self, state: dict[str, Any]) -> None:
        checks.state_fields("Bi-LoRA", state, "rho", "layers")
        checks.number("the state_dict's rho", state["rho"], above=0)
        check_rise(state)
        checks.same_layers("auxiliaries", shapes_of(state["layers"]), shapes_of(self.method_state()["layers"]))

    @torch.no_grad()
    def load_method_state(self, state: dict[str, Any] | None) -> None:
        if self._source is not None:
            self._source.rise.load(state)
        if state is None:
            logger.warning("the checkpoint has no Bi-LoRA part: the auxiliary stays as it is")
            return
        self.take_over(state, "rho")
        for name, (A, B, _) in self._auxiliaries().items():
            A.copy_(state["layers"][name]["A"])
            B.copy_(state["layers"][name]["B"])


@torch.no_grad()
def _assign(params: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)
