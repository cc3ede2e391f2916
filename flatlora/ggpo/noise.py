"""GGPO's noise: which standard deviation each row has, and what is remembered of the gradients for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.draw import Draw
from ..kernels.low_rank import exact
from ..layers.adapter import Adapter
from ..layers.base import corner
from ..layers.stack import BaseNorms, stacks, weight_sq
from ..layers.tangent import project, projection_row_sq
from ..layers.view import LoRALayer
from ..perturbation.passes import would_perturb
from ..perturbation.source import Source
from ..streams import derived_seed

# What a layer's standard deviations hold for, the state of the weights that they were computed from, they (m,), the
# `std` of its draw, and the gradient term (m,) within them.
Deviations = tuple[Any, Any, Tensor, Tensor, Tensor]


class RowNoise(Source):
    """The noise of all layers: its σ, β and step, and the rows it is scaled by. `always` is for measuring.

    Attributes:
        grad_sq: squared row norms (m,) of each layer's gradient that was read last, once there was one.
    """

    def __init__(
        self,
        layers: list[LoRALayer],
        sigma: float,
        beta: float,
        kind: Literal["gaussian", "low_rank"],
        rank: int,
        seed: int,
        update_every: int = 1,
        always: bool = False,
    ):
        super().__init__(layers)
        self.sigma, self.beta, self.kind, self.rank, self.seed = sigma, beta, kind, rank, seed
        self.update_every, self.always = update_every, always
        self.step = 0
        self.grad_sq: dict[str, Tensor] = {}
        self._stds: dict[str, Deviations] = {}
        self._order = {name: i for i, name in enumerate(self.layers)}  # in which they take turns
        self._measured: tuple[Any, str] = None, ""  # the step and the number of layers, and what `measured` says then
        self._norms = BaseNorms()
        self._observed: list[tuple[list[str], Tensor]] = []

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Draw | None:
        if self.sigma == 0:
            return None
        # The seed is a function of (seed, step, layer) and no running stream: every micro-batch, every recomputation,
        # every rank and a resumed run get the same ε, and nothing but these numbers has to be kept.
        # Two optimizers, each of an adapter of its own, don't draw the same.
        seed = derived_seed(self.seed, self.step, layer.name, *sorted(layer.names))
        return Draw(self.kind, self._deviations(layer, adapters)[3], seed, self.rank)

    def graph_kind(self, layer: LoRALayer) -> Any:
        m, n = layer.shape
        return "gaussian" if self.kind == "gaussian" else ((m, self.rank), (self.rank, n))

    def measures(self, layer: LoRALayer) -> bool:
        # Of Gaussian noise ⟨G, ε⟩ is a large product of its own: one layer's in a step, each in turn.
        # Neighbours in time lie far apart in depth, so that a mean over some of them is one over all.
        return super().measures(layer) and (self.kind != "gaussian" or self.measured() == layer.name)

    def measured(self) -> str:
        """The layer whose Gaussian noise is measured in this step."""
        key = self.step, len(self.layers)
        if self._measured[0] != key:
            names = list(self.layers)
            stride = next(i for i in range(round(0.618 * len(names)), 2 * len(names)) if math.gcd(i, len(names)) == 1)
            self._measured = key, names[self.step * stride % len(names)]
        return self._measured[1]

    def read_rise(self) -> None:
        # E⟨G(W'+ε), ε⟩ = E[εᵀHε], twice what noise adds to the loss: its first order has no mean.
        self.rise.read(0.5 * (len(self.passes) if self.kind == "gaussian" else 1))

    def std(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Tensor:
        """Standard deviations (m,) of a layer's rows."""
        return self._deviations(layer, adapters)[2]

    def _deviations(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Deviations:
        """The layer's entry in `_stds`; the first layer asked in a step has others computed with it."""
        if not self._holds(layer, layer.adapters() if adapters is None else adapters):
            with exact(layer.base.device):
                self._compute_stds(layer)
        return self._stds[layer.name]

    def _holds(self, layer: LoRALayer, adapters: list[Adapter]) -> bool:
        """Whether the layer's entry in `_stds` is that of now."""
        known = self._stds.get(layer.name)
        if known is None or known[0] != self._key(layer, adapters):
            return False
        return not self._is_due(layer.name, self.step) or known[1] == _states(layer, adapters)

    def _turn(self, name: str, step: int) -> tuple[int, int]:
        """Which of a layer's turns a step belongs to, and how many steps it has gone on."""
        return divmod(step + self._order.setdefault(name, len(self._order)), self.update_every)

    def _is_due(self, name: str, step: int) -> bool:
        """Whether a layer's standard deviations are computed anew in this step."""
        return self._turn(name, step)[1] == 0

    def forget(self) -> None:
        """Has all standard deviations computed anew."""
        self._stds = {}

    def std_in_use(self, name: str) -> Tensor | None:
        """A layer's standard deviations (m,), if the present step goes on with those of an earlier one."""
        known = self._stds.get(name)
        if known is None or self._is_due(name, self.step) or known[0][:3] != self._key(self.layers[name], [])[:3]:
            return None
        return known[2]

    def go_on_with(self, name: str, std: Tensor) -> None:
        """Uses what `std_in_use` returned until the layer's next turn; until then no gradients of it are read."""
        layer = self.layers[name]
        adapters, std = layer.adapters(), std.to(layer.base.device, copy=True)
        term = self.beta * self._grad_sq([name], std.unsqueeze(0))[0]
        self._stds[name] = self._key(layer, adapters), None, std, self._as_drawn(std, adapters), term

    def _key(self, layer: LoRALayer, adapters: list[Adapter]) -> Any:
        """What the standard deviations hold for: another turn has others."""
        turn, _ = self._turn(layer.name, self.step)
        return turn, self.sigma, self.beta, [(adapter.name, adapter.scaling) for adapter in adapters]

    def _compute_stds(self, asked: LoRALayer) -> None:
        # Of the others those that will be asked themselves and cost no gathering: never a key of a sharded layer, whose
        # parameters are others within its own forward.
        device = asked.base.device
        adapters = {name: layer.adapters() for name, layer in self.layers.items()}
        ready = [a for a in self.layers.values() if a is asked or self._is_ready(a, adapters[a.name], device)]
        stale = [layer for layer in ready if not self._holds(layer, adapters[layer.name])]
        for stack in stacks(stale, adapters):
            names = [layer.name for layer in stack.layers]
            row_sq, _ = weight_sq(stack, self._norms)
            terms = self.beta * self._grad_sq(names, row_sq)
            variance = (row_sq + terms).mul_(self.sigma**2 / stack.layers[0].shape[1])  # LoRA-GGPO's Eq. 6-8
            stds = variance.nan_to_num(0.0, posinf=0.0).clamp_(min=0.0).sqrt_()
            drawn = self._as_drawn(stds, itertools.chain(*stack.adapters))
            for layer, *row in zip(stack.layers, stds, drawn, terms, strict=True):
                own = adapters[layer.name]
                self._stds[layer.name] = self._key(layer, own), _states(layer, own), *row

    def _as_drawn(self, stds: Tensor, adapters: Iterable[Adapter]) -> Tensor:
        """`Draw.std`: made for many layers together, and not by launches in every layer and pass."""
        if self.kind == "low_rank":
            stds = stds * self.rank**-0.5
        wide = any(adapter.A.dtype == torch.float64 for adapter in adapters)
        return stds if stds.device.type == "cpu" or wide else stds.float()

    def _is_ready(self, layer: LoRALayer, adapters: list[Adapter], device: torch.device) -> bool:
        return self.sigma > 0 and would_perturb(self, layer, adapters) and _at_hand(layer, adapters, device)

    def _grad_sq(self, names: list[str], like: Tensor) -> Tensor:
        """Squared row norms (L, m) of the layers' last gradients; zero where there was none."""
        zero = torch.zeros_like(like[0])
        return torch.stack([self.grad_sq[name].to(like.device) if name in self.grad_sq else zero for name in names])

    def row_std(self) -> dict[str, Tensor]:
        """`std` of every layer, without a trace: layers that are asked for in another order are computed in other
        company, and differ in the last bits."""
        kept = dict(self._stds)
        try:
            return {name: self.std(layer).clone() for name, layer in self.layers.items()}
        finally:
            self._stds = kept

    def squares(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Expected ``‖ε‖²`` over the layers that the last passes went through, as they were perturbed last; ``‖W'‖²``;
        the gradient's share of ``‖ε‖²``.

        None if none has been.
        """
        if self.sigma == 0:
            return None
        noises: list[Tensor] = []
        both, grads = [], []
        for name, ((_, sigma, *_), _, std, _, term) in self._stds.items():
            if not (self.always or name in self.acted or name in self.passes):
                continue
            noise = self.layers[name].shape[1] * std.square().sum()
            noises.append(noise if not noises else noise.to(noises[0]))
            both.append(noises[-1] / sigma**2)
            grads.append(term.sum().to(noises[-1]))
        if not noises:
            return None
        noise, total, grad = (torch.stack(values).sum() for values in (noises, both, grads))
        return noise, total - grad, grad / total

    def read_gradients(self) -> bool:
        """Notes the norms of the gradients of layers that are due next; whether there are gradients of any layer."""
        self._observed = []
        due = {name: layer for name, layer in self.layers.items() if self._is_due(name, self.step + 1)}
        passes = self.with_gradients(due.values())
        with exact(next(iter(self.layers.values())).base.device):
            for adapters in passes.values():
                for stack in stacks([self.layers[name] for name in adapters], adapters):
                    if (projection := project(stack, self._norms)) is not None:
                        self._observed.append(
                            ([layer.name for layer in stack.layers], projection_row_sq(projection[0]))
                        )
            if len(passes) > 1:
                self._observed = _added_up(self._observed)
        found = bool(passes) or any(self.with_gradients([layer]) for layer in self.layers.values())
        if found:  # layers that this step's loss did not pass through have none
            seen = {name for names, _ in self._observed for name in names}
            left = [name for name in due if name in self.grad_sq and name not in seen]
            self._observed += [([name], torch.zeros_like(self.grad_sq[name]).unsqueeze(0)) for name in left]
        return found

    @torch.no_grad()
    def next_step(self) -> None:
        """Goes on to the next ε, scaled by the gradients noted last unless any of them is not finite."""
        super().next_step()
        self.step += 1
        if not self._observed:
            return
        # Decided on the device: asking the host whether all is finite would stall it at every step.
        sums = [new.sum() for _, new in self._observed]
        finite = torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()
        for names, new in self._observed:
            kept = torch.where(finite.to(new.device), new, self._grad_sq(names, new))
            self.grad_sq.update(zip(names, kept, strict=True))
        self._observed = []


def _added_up(observed: list[tuple[list[str], Tensor]]) -> list[tuple[list[str], Tensor]]:
    """The same with each layer once, its squares of passes that added different adapters summed."""
    total: dict[str, Tensor] = {}
    for name, row in ((name, row) for names, rows in observed for name, row in zip(names, rows, strict=True)):
        total[name] = total[name] + row if name in total else row
    return [([name], row.unsqueeze(0)) for name, row in total.items()]


def _at_hand(layer: LoRALayer, adapters: list[Adapter], device: torch.device) -> bool:
    """Whether its weights are whole and on `device`, as those of a sharded layer are in its forward alone."""
    base = layer.base
    if base.kind == "opaque":
        return False
    weights = [base.module.weight, *(p for a in adapters for p in (a.A_param, a.B_param, a.magnitude) if p is not None)]
    return all(p.device == device and p.numel() and not hasattr(p, "full_tensor") for p in weights)


def _states(layer: LoRALayer, adapters: list[Adapter]) -> Any:
    """What tells a layer's weights from others."""
    return layer.merged, layer.base.version, [_state(adapter) for adapter in adapters]


def _state(adapter: Adapter) -> tuple[Any, ...]:
    """What tells an adapter's values from others without reading them all.

    Autograd's version counters do not see writes through `.data`, such as those of PEFT's `hotswap_adapter`. Two
    elements show them, where reading them stalls no device.
    """
    versions = [(factor.device, factor._version) for factor in (adapter.A, adapter.B)]
    corners = [corner(factor) for factor in (adapter.A, adapter.B)]
    return versions, corners, adapter.magnitude is not None and adapter.magnitude._version
