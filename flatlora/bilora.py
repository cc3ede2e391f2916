"""Bi-LoRA: an auxiliary adapter ascends while the primary descends, so sharpness-aware training costs one pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .layers.adapter import Adapter
from .layers.base import whole, wide
from .layers.bnb import TrainingLayout, hold_training_layout
from .layers.view import LoRALayer, lora_layers, plain_name
from .perturbation import Perturbation, stacked
from .streams import shared_seed
from .wrapper import OptimizerWrapper

__all__ = ["BiLoRAOptimizer", "attach_auxiliary", "detach_auxiliary"]

logger = logging.getLogger("flatlora")

# The auxiliaries' name in the model they are attached to. They are registered there and not in their layers, because
# PEFT saves whatever lies in its layers, and in earlier versions whatever has "lora_" in its key.
NAME = "ascent_branches"


class Auxiliary(nn.Module):
    """The adapter that ascends: ``A`` (r, n) Kaiming-uniform, ``B`` (m, r) zero, ``scaling`` = alpha / r."""

    def __init__(self, layer: LoRALayer, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.layer_name = layer.name
        m, n = layer.shape
        like = layer.all_adapters()[0].A
        a = torch.empty(r, n)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(like.device, like.dtype))
        self.B = nn.Parameter(torch.zeros(m, r, device=like.device, dtype=like.dtype))
        self.scaling = alpha / r
        self.layout: TrainingLayout | None = None  # the whole model's, held by its first auxiliary

    def draw(self, layer: LoRALayer) -> Adapter | None:
        if not (layer.module.training and layer.active):
            return None
        return Adapter("", self.A, self.B, self.scaling)


class Branches(nn.ModuleList):
    """Where a model holds its auxiliaries. Called, it does nothing: `nn.Sequential` calls whatever is in it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def attach_auxiliary(
    model: nn.Module,
    r: int = 8,
    *,
    alpha: float | None = None,
    adapter: str | Iterable[str] | None = None,
    seed: int | None = None,
) -> list[nn.Parameter]:
    """Puts an auxiliary low-rank module beside the adapters of every adapted layer and returns their parameters.

    In train mode a layer then computes ``x·(W0 + s1·B1·A1 + s2·B2·A2)ᵀ``, both adapters through one pair of matmuls; in
    eval mode, in what PEFT saves and in merged weights it is as if the auxiliary were not there. The parameters are
    registered in `model`, so DDP and FSDP (wrap it after this call), `.to()` and `model.state_dict()` see them.

    Args:
        model: a model with adapters, as `lora_layers` reads it.
        r: rank of the auxiliary.
        alpha: its scaling is ``alpha / r``; by default ``2·r``.
        adapter: name or names of the adapters whose layers get one, and beside which it is active; None for all.
        seed: for the initial ``A``; by default torch's initial seed, rank 0's when distributed.

    Returns:
        ``A`` (r, n) and ``B`` (m, r) of every layer, in the layers' order.

    Raises:
        ValueError: no adapted layer, an unknown adapter, merged adapters, an auxiliary that is there already, r < 1.
            Nothing is attached then.
    """
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be an integer >= 1, got {r!r}")
    alpha = 2.0 * r if alpha is None else alpha
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number > 0, got {alpha!r}")
    layers = lora_layers(model, adapter)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("attach the auxiliary before DistributedDataParallel wraps the model, or it is never reduced")
    for layer in layers:
        if any(isinstance(other.source, Auxiliary) for other in stacked(layer.module)):
            raise ValueError(
                f"layer {layer.name!r} has an auxiliary already; call detach_auxiliary(model) before attaching another"
            )
        if layer.merged:
            raise ValueError(
                f"layer {layer.name!r} has merged adapters {sorted(layer.merged)}; unmerge them with "
                "model.unmerge_adapter() before attaching an auxiliary"
            )
    generator = torch.Generator().manual_seed(shared_seed() if seed is None else seed)
    auxiliaries = [Auxiliary(layer, r, alpha, generator) for layer in layers]
    auxiliaries[0].layout = hold_training_layout(model)
    for layer, auxiliary in zip(layers, auxiliaries, strict=True):
        Perturbation(layer, auxiliary).attach()
    model.add_module(NAME, Branches(auxiliaries))
    return [p for auxiliary in auxiliaries for p in (auxiliary.A, auxiliary.B)]


def detach_auxiliary(model: nn.Module) -> None:
    """Removes every trace of `attach_auxiliary` from the model. Idempotent."""
    for module in list(model.modules()):
        for perturbation in list(stacked(module)):
            if isinstance(perturbation.source, Auxiliary):
                perturbation.remove()
                if perturbation.source.layout is not None:
                    perturbation.source.layout.release()
        if NAME in module._modules:
            delattr(module, NAME)


class BiLoRAOptimizer(OptimizerWrapper):
    """Wraps any optimizer; parameter groups marked ``"ascent": True`` climb the loss that the others descend.

    Bi-LoRA (arXiv:2508.19564, Eq. 7-9) trains ``min over (B1, A1), max over ‖s2·B2·A2‖_F ≤ ρ`` of the loss at
    ``W0 + s1·B1·A1 + s2·B2·A2``: one forward and one backward give both sides their gradients. A step turns the sign of
    the ascent groups' gradients (8-bit optimizers have no `maximize`), lets the base optimizer move everything, turns
    the signs back, and clips the auxiliaries together: with ``c = sqrt(Σ_layers ‖s2·B2·A2‖_F²)``, every B2 and A2 is
    multiplied by ``sqrt(ρ/c)`` if ``c > ρ``.

    Gradient clipping: `clip_grad_norm_` over all parameters sees both sides, bounds their joint norm and scales them by
    one factor. To clip as plain LoRA would, pass it the primary's parameters alone.

    Args:
        optimizer: the built base optimizer, with at least one ascent group. An ascent group has its own `lr` and
            should have ``"weight_decay": 0.0``.
        model: the model that `attach_auxiliary` was called on, or one with auxiliaries of its own.
        rho: ρ, the largest total Frobenius norm of the perturbation.
        auxiliary: for two-branch layers of your own, the ``(A2 (r, n), B2 (m, r), scaling)`` of each; your layers then
            apply them themselves, in train mode alone. By default those that `attach_auxiliary` made.

    Raises:
        ValueError: no ascent group; an ascent group that holds a parameter of no auxiliary, or leaves out one of an
            auxiliary, or has `maximize` set; ρ not above 0.
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
    ):
        super().__init__(optimizer)
        if not (isinstance(rho, int | float) and math.isfinite(rho) and rho > 0):
            raise ValueError(f"rho must be a finite number > 0, got {rho!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.rho = float(rho)
        self._model = model
        self._triples = None if auxiliary is None else _named_triples(model, auxiliary)
        self._check_groups()

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        optimizer_cls: type[Optimizer],
        *,
        r: int = 8,
        alpha: float | None = None,
        rho: float = 0.05,
        adapter: str | Iterable[str] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> BiLoRAOptimizer:
        """Attaches an auxiliary and builds the optimizer over it and every parameter that requires a gradient.

        ``optimizer_cls(groups, **kwargs)`` is the base; the auxiliary's group gets no weight decay. `r`, `alpha`,
        `adapter` and `seed` are `attach_auxiliary`'s. If anything fails, the auxiliary is taken off again.
        """
        if not callable(optimizer_cls):
            raise TypeError(
                f"optimizer_cls must be a class such as torch.optim.AdamW, got {type(optimizer_cls).__name__}"
            )
        primary = [p for p in model.parameters() if p.requires_grad]
        ascending = attach_auxiliary(model, r, alpha=alpha, adapter=adapter, seed=seed)
        try:
            groups: list[dict[str, Any]] = [
                {"params": primary},
                {"params": ascending, "ascent": True, "weight_decay": 0.0},
            ]
            return cls(optimizer_cls(groups, **kwargs), model, rho=rho)
        except BaseException:
            detach_auxiliary(model)
            raise

    # --- the method: turn the ascending gradients, step, turn them back, clip all auxiliaries together ------------

    @torch.no_grad()
    def before_step(self) -> None:
        self._turn_ascent()

    @torch.no_grad()
    def after_step(self) -> None:
        self._turn_ascent()
        triples = self._auxiliaries()
        norm = _norm(triples)
        # On the device, as is the comparison: reading the norm would stall the host at every step.
        factors = [p for A, B, _ in triples.values() for p in (A, B)]
        below = 1 - max(torch.finfo(p.dtype).eps for p in factors)  # or rounding could leave the norm above ρ
        factor = torch.where(norm > self.rho, (self.rho / norm).sqrt() * below, 1.0)
        for p in factors:
            p.mul_(factor.to(p.device))

    def _turn_ascent(self) -> None:
        grads = [p.grad for group in self.param_groups if group.get("ascent") for p in group["params"]]
        found = [grad for grad in grads if grad is not None]
        if found:
            torch._foreach_neg_(found)

    @torch.no_grad()
    def perturbation_norm(self) -> float:
        """``sqrt(Σ_layers ‖s2·B2·A2‖_F²)`` at present; never above ρ after a step."""
        return float(_norm(self._auxiliaries()))

    def perturbation_parameters(self) -> list[Tensor]:
        return [p for A, B, _ in self._auxiliaries().values() for p in (A, B)]

    def current_perturbation(self) -> list[Tensor]:
        """The values of the auxiliaries' parameters."""
        return [p.detach().clone() for p in self.perturbation_parameters()]

    @contextmanager
    def perturbed_as(self, perturbation: list[Tensor]) -> Iterator[None]:
        """Within the context the auxiliaries have these values."""
        params = self.perturbation_parameters()
        held = self.current_perturbation()
        try:
            _assign(params, perturbation)
            yield
        finally:
            _assign(params, held)

    def unperturbed(self) -> AbstractContextManager[None]:
        return self.perturbed_as([torch.zeros_like(p) for p in self.perturbation_parameters()])

    def _auxiliaries(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        if self._triples is not None:
            return self._triples
        return _attached(self._model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_groups()
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_groups(self) -> None:
        auxiliaries = self._auxiliaries()
        ours = {id(p): name for name, (A, B, _) in auxiliaries.items() for p in (A, B)}
        ascent = [group for group in self.param_groups if group.get("ascent")]
        if not auxiliaries:
            raise ValueError(
                f"{type(self._model).__name__} has no auxiliary; call attach_auxiliary(model) first, or pass "
                "auxiliary=[(A, B, scaling), ...] for layers of your own, or use BiLoRAOptimizer.for_model"
            )
        if not ascent:
            raise ValueError(
                f"none of the {len(self.param_groups)} parameter groups ascends; put the auxiliary's parameters in one "
                'with "ascent": True: optimizer_cls([{"params": primary}, {"params": aux, "ascent": True}])'
            )
        held = {id(p) for group in ascent for p in group["params"]}
        foreign = [tuple(p.shape) for group in ascent for p in group["params"] if id(p) not in ours]
        if foreign:
            raise ValueError(
                f"the ascent groups hold {len(foreign)} parameters of no auxiliary (first shape: {foreign[0]}); only "
                "what attach_auxiliary returned may ascend"
            )
        missing = sorted({name for key, name in ours.items() if key not in held})
        if missing:
            raise ValueError(
                f"the auxiliary of {len(missing)} layers is in no ascent group (first: {missing[0]!r}); pass all that "
                "attach_auxiliary returned"
            )
        if any(group.get("maximize") for group in ascent):
            raise ValueError("an ascent group has maximize=True and would ascend twice over; leave maximize off")

    # --- checkpoints: a saved adapter leaves the auxiliary out, so the optimizer's state carries it ---------------

    def method_state(self) -> dict[str, Any]:
        layers = {name: {"A": A.detach(), "B": B.detach()} for name, (A, B, _) in self._auxiliaries().items()}
        return {"rho": self.rho, "layers": layers}

    def check_method_state(self, state: dict[str, Any]) -> None:
        ours = self._auxiliaries()
        theirs = state["layers"]
        if ours.keys() != theirs.keys():
            odd = sorted(ours.keys() ^ theirs.keys())
            raise ValueError(
                f"the state_dict is of another model: it has {len(theirs)} auxiliaries, this one {len(ours)}; found in "
                f"one alone: {', '.join(odd[:3])}. Load the checkpoint that was saved with this model"
            )
        for name, (A, B, _) in ours.items():
            found = tuple(theirs[name]["A"].shape), tuple(theirs[name]["B"].shape)
            if found != (tuple(A.shape), tuple(B.shape)):
                raise ValueError(
                    f"the state_dict is of another model: the auxiliary of {name!r} has A, B of shapes {found} in it "
                    f"and {tuple(A.shape)}, {tuple(B.shape)} here"
                )

    @torch.no_grad()
    def load_method_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            logger.warning("the checkpoint has no Bi-LoRA part: the auxiliary stays as it is")
            return
        self.rho = state["rho"]
        for name, (A, B, _) in self._auxiliaries().items():
            A.copy_(state["layers"][name]["A"])
            B.copy_(state["layers"][name]["B"])


@torch.no_grad()
def _assign(params: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def _attached(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of every auxiliary on the model, by its layer's name."""
    auxiliaries = [module for module in model.modules() if isinstance(module, Auxiliary)]
    return {auxiliary.layer_name: (auxiliary.A, auxiliary.B, auxiliary.scaling) for auxiliary in auxiliaries}


def _named_triples(
    model: nn.Module, triples: Sequence[tuple[Tensor, Tensor, float]]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for i, triple in enumerate(triples):
        A, B, scaling = triple
        if id(A) not in names or id(B) not in names:
            raise ValueError(f"auxiliary[{i}]: A and B must be parameters of the model, which has neither or only one")
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"auxiliary[{i}]: A {tuple(A.shape)} and B {tuple(B.shape)} do not multiply; expected (r, n) and (m, r)"
            )
        found[plain_name(names[id(A)])] = (A, B, float(scaling))
    return found


def _norm(triples: dict[str, tuple[Tensor, Tensor, float]]) -> Tensor:
    """``sqrt(Σ ‖s·B·A‖_F²)``, through ``‖B·A‖_F² = Σ (BᵀB)∘(AAᵀ)``: nothing larger than r×r is formed."""
    squares = []
    for A, B, scaling in triples.values():
        dtype = wide(A.device)
        a, b = whole(A).to(dtype), whole(B).to(dtype)
        squares.append(scaling**2 * ((b.t() @ b) * (a @ a.t())).sum())
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().clamp_(min=0.0).sqrt_()
