"""LoRASAM's ε: the last step's gradient, projected on the adapters' tangent spaces."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels.low_rank import exact
from ..layers.adapter import Adapter
from ..layers.base import sum_dtype
from ..layers.stack import BaseNorms, Stack, stacks
from ..layers.tangent import LEADING, Factors, product_sq, project
from ..layers.view import LoRALayer
from ..perturbation.source import Names, Source, held_names
from .radius import Radius


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
        if self.radius is not None:  # here, as ranks without gradients must take part
            rise = self.rise.newest
            if rise is not None and self.maximizes:
                rise = -rise
            self.radius.see(rise, next(iter(self.layers.values())).base.device)

    def read_gradients(self) -> bool:
        """Notes the direction that the gradients at hand make, for the next step; whether there are gradients."""
        self._next = {}
        device = next(iter(self.layers.values())).base.device
        squares, rests = [], []
        with exact(device):
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
        if (radius := self.radius) is not None:
            for place in self.direction.keys() - self._next.keys():  # of passes that did not run
                B, A = self.direction[place]
                self._next[place] = B * (radius.next[0] / radius.rho.to(radius.next)).to(B), A
            radius.advance()
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
