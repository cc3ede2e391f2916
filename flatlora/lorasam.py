"""LoRASAM: sharpness-aware training of LoRA in one pass, against the last gradient in the full weights' norm."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checks
from .kernels.low_rank import without_autocast
from .layers.adapter import Adapter
from .layers.base import sum_dtype
from .layers.stack import BaseNorms, Stack, stacks
from .layers.tangent import LEADING, Factors, product_sq, project
from .layers.view import LoRALayer
from .perturbation.optimizer import PerturbingOptimizer, trained_by
from .perturbation.radius import LARGEST, Radius, check_radius
from .perturbation.rise import check_rise
from .perturbation.source import Names, Source, held_names

logger = logging.getLogger("flatlora")


class LastGradient(Source):
    """Gives each layer its part of ``ε = ρ·u``, where u is the last gradient's projection, of norm one over all layers.

    Where a `radius` chooses ρ, `rho` is 1 and u has the chosen norm, which the host does not know.

    Attributes:
        direction: u of each layer, for passes that add the adapters of these names, as factors B (m, k) and A (k, n),
            of GraLoRA (g, g, m/g, k) and (g, g, k, n/g), k the smaller of 2r and `LEADING`; empty before the first
            gradients.
        gradient_norm: ``sqrt(Σ_layers ‖P(G)‖_F²)`` of the gradients looked at last, on their device.
        left_out: the share of it that is beyond those directions.
        maximizes: whether the base climbs, so that the adversary goes down.
    """

    def __init__(self, layers: list[LoRALayer], rho: float, radius: Radius | None, no_grad: bool):
        super().__init__(layers)
        self.rho, self.radius, self.no_grad, self.maximizes = rho, radius, no_grad, False
        self.direction: dict[tuple[str, Names], tuple[Tensor, Tensor]] = {}
        self.gradient_norm = self.left_out = torch.zeros((), dtype=torch.float32)
        self._next: dict[tuple[str, Names], tuple[Tensor, Tensor]] = {}
        self._norms = BaseNorms()
        self._ran: set[tuple[str, Names]] = set()  # passes of the last step

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Adapter | None:
        if self.rho == 0 or not self.direction:
            return None
        names = held_names(layer, layer.adapters() if adapters is None else adapters)
        if (factors := self.direction.get((layer.name, names))) is None:
            return None
        device = layer.base.device
        B, A = (factor.to(device) for factor in factors)
        return Adapter("", A, B, self.rho)

    def graph_kind(self, layer: LoRALayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        trained = [adapter for adapter in layer.all_adapters() if adapter.trained] or layer.all_adapters()
        g = max(adapter.k for adapter in trained)
        rank = min(2 * sum(adapter.A.shape[-2] for adapter in trained if adapter.k == g), LEADING)
        (m, n), grid = layer.shape, () if g == 1 else (g, g)
        return (*grid, m // g, rank), (*grid, rank, n // g)

    def norm(self, acted: bool = False) -> Tensor:
        """‖u‖_F over all layers, by ``‖B·A‖_F² = Σ (BᵀB)∘(AAᵀ)``; 0 before there is a direction.

        `acted`: over those alone that passes of the last step went through. Of passes that add different adapters,
        which have a u each, the largest.
        """
        squares: dict[Names, Tensor] = {}
        for (layer, names), factors in self.direction.items():
            if not acted or (layer, names) in self._ran:
                square = product_sq(*factors).to(self.gradient_norm.device)
                squares[names] = squares[names] + square if names in squares else square
        if not squares:
            return torch.zeros_like(self.gradient_norm)
        return torch.stack(list(squares.values())).max().clamp(min=0.0).sqrt()

    def read_rise(self) -> None:
        if not self.direction:
            self.rise.forget()  # a compiled graph has recorded the zeros in ε's place
        super().read_rise()
        if self.radius is not None:  # before the next direction is scaled
            rise = self.rise.newest
            if rise is not None and self.maximizes:
                rise = -rise
            self.radius.see(rise, next(iter(self.layers.values())).base.device)

    def read_gradients(self) -> bool:
        """Notes the direction that the gradients at hand make, for the next step; whether there are gradients."""
        self._next = {}
        device = next(iter(self.layers.values())).base.device
        squares, rests = [], []
        # Out of inference mode, which leaves tensors unfit for autograd, and of autocast, which rounds products.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
            for names, adapters in self.with_gradients().items():
                found: list[tuple[Stack, Factors]] = []
                for stack in stacks([self.layers[name] for name in adapters], adapters):
                    if (projection := project(stack, self._norms)) is not None:
                        factors, rest = projection
                        found.append((stack, factors))
                        rests += [] if rest is None else [rest]
                if found:
                    squares.append(self._note(found, names))
            if squares:
                total = torch.stack(squares).sum() if len(squares) > 1 else squares[0]
                rest = torch.stack([one.to(total) for one in rests]).sum() if rests else torch.zeros_like(total)
                self.gradient_norm = (total + rest).sqrt()
                self.left_out = (rest / (total + rest)).nan_to_num(0.0).sqrt()
        return bool(squares)

    def _note(self, found: list[tuple[Stack, Factors]], names: Names) -> Tensor:
        """Notes u of the passes that add the adapters of these names, and returns ``Σ_layers ‖P(G)‖_F²``.

        Empties `found` on its way, so that no more is held than has to be.
        """
        # Of each layer in its own precision, which is faster, and long sums over layers in float64.
        norms = [torch.linalg.vector_norm(part.flatten(1), dim=1) for _, one in found for part in one[1:3]]
        total = torch.cat([norm.to(norms[0].device) for norm in norms]).to(sum_dtype(norms[0].device)).square().sum()
        scale = -total.rsqrt() if self.maximizes else total.rsqrt()
        # Decided on the device, as asking the host would stall it at every step: gradients that are not finite, or
        # zero, have no direction, and the former stays.
        usable = total.isfinite() & (total > 0)
        if self.radius is not None:
            scale = scale * self.radius.go_on(usable).to(scale)
        while found:
            stack, parts = found.pop(0)
            dtype = next(a.A.dtype for a in stack.adapters[0] if a.name in stack.layers[0].names)
            places = [(layer.name, names) for layer in stack.layers]
            former = [self.direction.get(place, (None, None)) for place in places]
            new = [
                _either(usable, factor.to(dtype), old)
                for factor, old in zip(_scaled(*parts, scale), zip(*former, strict=True), strict=True)
            ]
            self._next.update((place, (b, a)) for place, b, a in zip(places, *new, strict=True))
        for place in self.direction.keys() - self._next.keys():
            if place[1] == names:  # layers that this step's loss did not pass through
                B, A = self.direction[place]
                self._next[place] = torch.where(usable.to(B.device), torch.zeros_like(B), B), A
        return total

    def next_step(self) -> None:
        """Goes on to the direction noted last, if one was; that of passes which did not run stays."""
        self._ran = {(layer, names) for layer, kinds in self.passes.items() for names in kinds}
        super().next_step()
        if self.radius is not None:
            grown = self.radius.next[0] / self.radius.rho.to(self.radius.next)
            for place in self.direction.keys() - self._next.keys():
                B, A = self.direction[place]
                self._next[place] = B * grown.to(B), A
            self.radius.advance()
        self.direction = {**self.direction, **self._next}
        self._next = {}


def _scaled(v: Tensor, c: Tensor, d: Tensor, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``scale·(v·c + d·u) = B·A`` as B (L, m, k) and A (L, k, n), or in blocks (L, g, g, ·, ·)."""
    scale = scale.to(c.device, c.dtype)
    B, A = torch.cat([v, d * scale], -1), torch.cat([c * scale, u], -2)
    return (B[:, 0, 0], A[:, 0, 0]) if B.shape[1] == 1 else (B, A)


def _either(usable: Tensor, new: Tensor, former: Iterable[Tensor | None]) -> Tensor:
    """`new` (L, ...) if it is usable, else each layer's former; zero for one that has none, or of other adapters."""
    if usable.device.type == "cpu" and usable:  # which the host knows without waiting
        return new
    zero = torch.zeros_like(new[0])
    old = [zero if one is None or one.shape != zero.shape else one.to(zero) for one in former]
    return torch.where(usable.to(new.device), new, torch.stack(old))


class LoRASAMOptimizer(PerturbingOptimizer):
    """Wraps any optimizer; between two of its steps the model trains at ``W' + ε``, uphill of where it stands.

    SAM (arXiv:2010.01412, Eq. 2) descends by the gradient at ``W + ρ·G/‖G‖`` and needs a pass of its own for G. Here ε
    is made of the gradients that the last step was taken with, on another batch and at other weights:

        ε_t = ρ·P(G_{t−1}) / sqrt(Σ_layers ‖P(G_{t−1})‖_F²)

    where P(G) is the orthogonal projection of the gradient of ``W' = W0 + s·B·A`` on the adapter's tangent space
    ``{B·X + Y·A}``. It follows from the gradients of A and B alone and has rank 2r, so a layer applies ε as one more
    low-rank term: no second pass, no closure, no auxiliary, no (m, n) matrix. The base optimizer steps A and B at W'.
    ε is zero until the first step has been taken, the same for all micro-batches of a step, and free of the gradient's
    scale, so that accumulation, loss scaling and clipping leave it alone.

    Above r = 16 a layer keeps 32 directions of its P(G) alone, near the leading ones, and ε is scaled to ρ: a product
    of rank 2r would cost as much as the adapter itself. On the encoder below, at r = 64, they held 97.5 % or more of
    ``Σ_layers ‖P(G)‖_F²``; ``metrics()["left_out"]`` is the rest.

    Lineage. The last gradient stands for SAM's own in AsyncSAM (arXiv:2503.11147), in the space of the parameters that
    the optimizer holds, and in S²-SAM (NeurIPS 2024, OpenReview MJgMMqMDu4), in sparse training; EFMLoRA
    (arXiv:2508.00522) brings a perturbation of the full weights into LoRA's space in one pass. MSAM (arXiv:2401.12033)
    and LoRA-MGPO (arXiv:2502.14538) perturb along momentum. LookSAM (arXiv:2203.02714) takes SAM's first pass every k
    steps, ESAM (arXiv:2110.03141) over a part of weights and data, SAF (arXiv:2205.14083) replaces it by a loss on past
    outputs. For LoRA, BAR (arXiv:2410.14802) keeps of SAM over A and B what it does to their balance. New here, as far
    as we know, is the projection: steepest ascent in the norm of the full weights among all ε that keep to the tangent
    space, from what LoRA's backward pass leaves anyway.

    Measured on an encoder of 22M parameters (`examples/results.md`). The default ρ = 0.05 at LoRA's own rate of 5e-4:
    1.3 ± 0.3 and 1.7 ± 0.3 points of test accuracy more on headlines with 40 % wrong labels, +1.1 ± 0.3 and −0.3 ± 0.1
    on movie sentences with 20 % (each on eight seeds), ties on clean labels; mostly a lower loss, and a calibration
    error that is lower until a temperature is fitted. ρ = 0.15 is 2.1 ± 0.7 points above LoRA at its better rate on
    those headlines (p = 0.008, 24 paired seeds that were run after all was fixed), and below it on the movies. A
    running mean of gradients did worse, ``D·A + B·C`` no better.

    `flatlora.reference.lorasam_perturbation` is ε in a few lines.

    Layers are perturbed in the passes that train them and in no other, as by `GGPOOptimizer`. GraLoRA's blocks are
    projected each on its own. A step whose gradients are not finite, or all zero, leaves ε as it was. Under a base
    optimizer with ``maximize=True`` ε goes downhill.

    Args:
        optimizer: the built base optimizer; it must hold adapter parameters of `model`.
        model: the model with adapters, before or after DDP or FSDP wrap it.
        rho: ρ, the Frobenius norm of ε over all layers; by default 0.05. 0 switches the method off. May be set between
            steps.
        rise: in place of `rho`, how far ε is to raise the loss, in the units of the loss that is backpropagated: ρ
            grows or shrinks by up to a tenth a step, between 1e-4 and 0.3, until a running mean of
            ``metrics()["loss_rise"]``, over all ranks, is there. Ranks must step alike.
        adapter: name or names of the adapters; None for all whose parameters `optimizer` holds and that require a
            gradient now.
        perturb_no_grad: perturb passes in train mode that record no gradients too, such as ``torch.no_grad()``'s.

    Raises:
        ValueError: a bad number or name, `rho` and `rise`, no adapted layer, an optimizer without adapter parameters, a
            model that another `LoRASAMOptimizer` perturbs and has not stepped with. Nothing has been attached then.
        TypeError: `optimizer` or `model` is of the wrong type.
        RuntimeError: from `step()`, once an optimizer that was built later has taken the model over.

    Example:
        >>> optimizer = LoRASAMOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), model, rho=0.05)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        rho: float | None = None,
        rise: float | None = None,
        adapter: str | Iterable[str] | None = None,
        perturb_no_grad: bool = False,
    ):
        super().__init__(optimizer)
        if rho is not None and rise is not None:
            raise ValueError(f"rho={rho!r} and rise={rise!r}: rise chooses rho; give one of them")
        rho = checks.number("rho", 0.05 if rho is None else rho)
        radius = None if rise is None else Radius(checks.number("rise", rise, above=0.0))
        self._model, self._adapter = model, adapter
        layers = trained_by(model, adapter, optimizer)
        self._source = LastGradient(layers, rho if radius is None else 1.0, radius, perturb_no_grad)
        self._strength = "rho" if radius is None else "rise"
        self.reattach()

    # --- the method: the gradients that a step is taken with make the next ε ----------------------------------------

    def before_step(self) -> None:
        self._source.maximizes = self._maximizes()
        super().before_step()
        if self._attached and not self._source.read_gradients() and self._source.rho > 0:
            self.miss_gradients("the perturbation stays as it is")

    def _maximizes(self) -> bool:
        """Whether adapters climb; what else climbs, such as a multiplier, does not matter."""
        climbing = {id(p) for group in self.param_groups if group.get("maximize") for p in group["params"]}
        adapters = [a for layer in self._source.layers.values() for a in layer.all_adapters()] if climbing else []
        return any(id(p) in climbing for a in adapters for p in (a.A_param, a.B_param))

    def way_out(self, much: bool) -> str:
        if self._source.radius is not None and not much and self.rho > 0.999 * LARGEST:
            return f"rho is at its upper bound of {LARGEST:g}"
        return super().way_out(much)

    @property
    def rho(self) -> float:
        """ρ; a change is felt at the next forward. Under `rise` the next step's, for which the host waits."""
        radius = self._source.radius
        return self._source.rho if radius is None else float(radius.rho)

    @rho.setter
    def rho(self, value: float) -> None:
        if self._source.radius is not None:
            raise ValueError(f"rho={value!r}: rise={self.rise:g} chooses it; set rise, or build with rho")
        self._source.rho = checks.number("rho", value)

    @property
    def rise(self) -> float | None:
        """How far ε is to raise the loss, where that chooses ρ; else None. May be set between steps."""
        return None if self._source.radius is None else self._source.radius.target

    @rise.setter
    def rise(self, value: float) -> None:
        if self._source.radius is None:
            raise ValueError(f"rise={value!r}: ρ is {self.rho:g} here; build the optimizer with rise")
        self._source.radius.target = checks.number("rise", value, above=0.0)

    def perturbation_norm(self) -> float:
        """``sqrt(Σ_layers ‖ε‖_F²)`` at present: ρ; 0 before the first step and after `remove()`."""
        return self._source.rho * float(self._source.norm()) if self._attached else 0.0

    def metrics(self) -> dict[str, Tensor]:
        """Four numbers over all layers together, five under `rise`.

        ``loss_rise``: how far ε raised the loss of the last step, to first order at the perturbed point,
        ``Σ_layers ⟨G, ε⟩`` over all its backward passes, in the units of the loss that was backpropagated, of this rank
        alone. ``ρ·projected_gradient_norm`` where successive gradients agree, as early, later less.
        ``perturbation_to_rho``: ``sqrt(Σ_layers ‖ε‖_F²)`` over ρ, of the layers that the last step's passes went
        through; 0 before the first gradients and where the method is off, otherwise 1.
        ``projected_gradient_norm``: ``sqrt(Σ_layers ‖P(G)‖_F²)`` of the gradients that the last step was taken with, in
        units of the loss per unit of weight.
        ``left_out``: the share of it, from 0 to 1, that is beyond each layer's 32 leading directions and that ε lacks;
        estimated, and 0 up to r = 16.
        ``rho``: ρ of the next step, where `rise` chooses it.
        """
        norm, radius = self._source.gradient_norm, self._source.radius
        off = self._source.rho == 0 or not self._attached
        relative = torch.zeros_like(norm) if off else self._source.norm(acted=True)
        rise = torch.zeros_like(norm) if off else self._source.rise.value
        gradients = {"projected_gradient_norm": norm, "left_out": self._source.left_out}
        own = {"loss_rise": rise, "perturbation_to_rho": relative, **gradients}
        if radius is not None:
            own |= {"rho": radius.rho, "perturbation_to_rho": relative / radius.rho.to(relative)}
        return self._with_inner(own)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        layers: dict[str, Any] = self.layer_identities()
        for layer in layers.values():
            layer.update(B=None, A=None)
        for (name, names), factors in self._source.direction.items():
            layer, B, A = layers[name], *(factor.clone() for factor in factors)  # of tensors of many layers
            if names == tuple(layer["ranks"]):
                layer.update(B=B, A=A)
            else:  # of passes that add some of the adapters
                layer.setdefault("directions", {})[".".join(names)] = {"B": B, "A": A}
        radius = self._source.radius
        state = {"rho": self._source.rho, "layers": layers, "rise": self._source.rise.state()}
        return state if radius is None else {**state, "radius": radius.state()}

    def check_method_state(self, state: dict[str, Any]) -> None:
        checks.state_fields("LoRASAM", state, "rho", "layers")
        checks.number("the state_dict's rho", state["rho"])
        check_rise(state)
        if "radius" in state:
            check_radius(state["radius"])
        theirs = f"rise={state['radius']['rise']:g}" if "radius" in state else f"rho={state['rho']:g}"
        ours = f"rho={self.rho:g}" if self.rise is None else f"rise={self.rise:g}"
        if theirs.split("=")[0] != ours.split("=")[0]:
            raise ValueError(
                f"the checkpoint was written with {theirs}, and this optimizer has {ours}; build it with {theirs}"
            )
        self.check_layer_states("LoRASAM", state["layers"], "B", "A")
        for name, layer in state["layers"].items():
            if not all(_fit(B, A, *layer["shape"]) for _, B, A in _directions(layer)):
                raise ValueError(
                    f"the state_dict's B and A of layer {name!r} must both be None, or factors of a {layer['shape']} "
                    "perturbation; load a state_dict that this library wrote"
                )

    def load_method_state(self, state: dict[str, Any] | None) -> None:
        source = self._source
        source.direction, source._next = {}, {}
        source.rise.load(state)
        if state is None:
            if source.radius is not None:
                source.radius.start()
            logger.warning("the checkpoint has no LoRASAM part: there is no perturbation until the next step")
            return
        if source.radius is None:
            self.take_over(state, "rho")
        else:
            self.take_over(state["radius"], "rise")
            source.radius.load(state["radius"])
        for name, layer in state["layers"].items():
            device = source.layers[name].base.device
            for names, B, A in _directions(layer):
                if B is not None:
                    source.direction[name, names] = B.to(device, copy=True), A.to(device, copy=True)


def _directions(layer: dict[str, Any]) -> list[tuple[Names, Any, Any]]:
    """What a checkpoint has of a layer's directions: the adapters' names, B and A."""
    some = [(tuple(key.split(".")), one["B"], one["A"]) for key, one in layer.get("directions", {}).items()]
    return [(tuple(layer["ranks"]), layer["B"], layer["A"]), *some]


def _fit(B: Any, A: Any, m: int, n: int) -> bool:
    """Whether B and A are both None or make an (m, n) matrix, whole or in a grid of blocks."""
    if B is None and A is None:
        return True
    if not (isinstance(B, Tensor) and isinstance(A, Tensor) and A.dim() in (2, 4) and A.numel()):
        return False
    grid = tuple(A.shape[:-2])
    g, rank = (grid or (1,))[0], A.shape[-2]
    return tuple(B.shape) == (*grid, m // g, rank) and tuple(A.shape) == (*grid, rank, n // g) and grid in ((), (g, g))
