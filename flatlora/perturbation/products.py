"""The product of a layer's input with its perturbed weight, ``x·(W' + ε)ᵀ``, and its exact gradients.

It is fused with the layer's own products where the layer is plain LoRA over a known base, and added beside the layer's
own `forward` in every other case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import operators
from ..kernels.blocks import BlockOptions, add_blocks
from ..kernels.draw import Draw, draw_gaussian, draw_low_rank, rise_of
from ..kernels.low_rank import Added, AddedTerms, added, autocasts, cast, compute_dtype
from ..kernels.operators import GraphNoise, LayerHandle, is_tracing
from ..layers.adapter import Adapter, stored_blocks
from ..layers.base import BaseWeight
from ..layers.view import LoRALayer

Term = tuple[Draw | GraphNoise | Adapter, LayerHandle | None]


class Terms:
    """What is added to a layer's weight in one pass, sorted once by how it is multiplied.

    Each term stands with the handle that records ``⟨G, ε⟩`` of it in backward, or with None.
    """

    def __init__(self, terms: Iterable[Term]):
        self.gaussian: list[tuple[Draw, LayerHandle | None]] = []  # noise that is added to the weight (m, n) itself
        self.in_graph: list[tuple[GraphNoise, LayerHandle | None]] = []  # the same in a graph, its seed in a tensor
        self.learned: list[tuple[Adapter, LayerHandle | None]] = []  # low-rank adapters that get gradients
        self.low_rank: list[tuple[Draw, LayerHandle | None]] = []  # noise in two factors
        self.constant: list[tuple[Adapter, LayerHandle | None]] = []  # low-rank adapters that get no gradients
        self.blocks: list[tuple[Adapter, LayerHandle | None]] = []  # grids of them
        for term, handle in terms:
            if isinstance(term, GraphNoise):
                self.in_graph.append((term, handle))
            elif isinstance(term, Draw):
                (self.gaussian if term.kind == "gaussian" else self.low_rank).append((term, handle))
            elif term.A.dim() == 4:
                self.blocks.append((term, handle))
            else:
                learned = term.A.requires_grad or term.B.requires_grad
                (self.learned if learned else self.constant).append((term, handle))

    def plan(
        self, n: int, dtype: torch.dtype, weight: Callable[[Any], Tensor] | None, in_place: bool
    ) -> tuple[AddedTerms, list[Tensor]]:
        """The plan of `Added` for the low-rank terms, and the factors that it learns."""
        scalings = (
            *(a.scaling for a, _ in self.learned),
            *(1.0 for _ in self.low_rank),
            *(a.scaling for a, _ in self.constant),
        )
        constant = (
            *(draw_low_rank(draw, n, dtype) for draw, _ in self.low_rank),
            *((cast(adapter.B, dtype), cast(adapter.A, dtype)) for adapter, _ in self.constant),
        )
        grad_scale = tuple(adapter.grad_scale for adapter, _ in self.learned)
        factors = [factor for adapter, _ in self.learned for factor in (adapter.A, adapter.B)]
        handles = tuple(handle for _, handle in (*self.learned, *self.low_rank, *self.constant))
        noise = tuple((handle, partial(rise_of, draw)) for draw, handle in self.gaussian if handle is not None)
        return AddedTerms(dtype, scalings, constant, grad_scale, weight, in_place, handles, noise), factors


def fused_output(layer: LoRALayer, base: BaseWeight, x: Tensor, adapters: list[Adapter], extras: list[Term]) -> Tensor:
    """The output of a `fusable` layer: its base's product and all low-rank terms in one function."""
    # `add_update` adds adapters to whatever base output; dropout acts on an adapter's own input.
    add_update = layer.module.add_update if hasattr(type(layer.module), "add_update") else None
    undropped = [] if add_update else [adapter for adapter in adapters if isinstance(adapter.dropout, nn.Identity)]
    out = _base_output(base, x, Terms([*((adapter, None) for adapter in undropped), *extras]))
    if add_update:
        return add_update(out, x, True)
    if len(undropped) < len(adapters):
        # Dropout draws from the global stream: cast before it as PEFT does, so that it draws the same.
        if base.kind == "float" or not autocasts(x.device):
            x = x.to(adapters[0].A.dtype)
        for adapter in adapters:
            if adapter.dropout is not None and not isinstance(adapter.dropout, nn.Identity):
                out = _add(base, out, adapter.dropout(x), Terms([(adapter, None)]), in_place=True)
    return out


def beside_output(base: BaseWeight, out: Tensor, x: Tensor, terms: Terms) -> Tensor:
    """`terms` added to `out`, which the layer's own forward made of x."""
    dtype = compute_dtype(x, out.dtype)
    return _add(base, _plus_noise(out, base, x, terms, dtype), x, terms, _noisy(base, terms, dtype, alone=True))


def _base_output(base: BaseWeight, x: Tensor, terms: Terms) -> Tensor:
    """The base layer's output and `terms`."""
    weight = base.float_weight() if base.kind == "float" else None
    like = weight.dtype if weight is not None else getattr(base.module, "compute_dtype", None) or x.dtype
    dtype = compute_dtype(x, like)
    bias = getattr(base.module, "bias", None)
    if is_tracing():
        if weight is None or not terms.in_graph:
            return _add(base, _plus_noise(base.module(x), base, x, terms, dtype), x, terms)
        out = _plus_noise(None, base, x, terms, dtype, weight)
        return _add(base, out if bias is None else out + bias.to(dtype), x, terms)
    if noisy := _noisy(base, terms, dtype):
        return _add(base, None, x, terms, noisy, weight, bias)
    if weight is not None:
        return _add(base, None, x, terms, lambda stored: cast(stored, dtype), weight, bias)
    out = base.module(x)
    # Autograd forbids writing to views, such as bitsandbytes' outputs.
    return _add(base, out, x, terms, in_place=not out._is_view())


def _noisy(
    base: BaseWeight, terms: Terms, dtype: torch.dtype, alone: bool = False
) -> Callable[[Tensor | None], Tensor] | None:
    """A function of the stored weight, or of None for a quantised one, to W0 + ε or to ε `alone`; None without ε."""

    def make(weight: Tensor | None) -> Tensor:
        if weight is None and not alone:
            weight = base.dense(dtype)
        for draw, _ in terms.gaussian:
            weight = draw_gaussian(draw, base.shape[1], weight, dtype)
        assert weight is not None
        return weight

    return make if terms.gaussian else None


def _plus_noise(
    out: Any, base: BaseWeight, x: Tensor, terms: Terms, dtype: torch.dtype, weight: Tensor | None = None
) -> Any:
    """``out + x·(weight + Σ ε)ᵀ`` over the noises of a graph, in `dtype`; each part may be missing."""
    for noise, handle in terms.in_graph:
        noised = weight, noise.std, noise.seed, base.shape[1]
        if not operators.in_functorch():
            number = None if handle is None else handle.number
            product = operators.noisy_product(x.to(dtype), *noised, False, number, None)
        else:
            product = x.to(dtype) @ operators.noisy_weight(*noised, dtype).t()
        out, weight = product if out is None else out + product.to(out.dtype), None
    return out


def _add(
    base: BaseWeight,
    out: Tensor | None,
    x: Tensor,
    terms: Terms,
    make_weight: Callable[[Any], Tensor] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`Added` of the low-rank `terms`, and `add_blocks` of the grids; `make_weight` makes W out of the others."""
    like = terms.learned[0][0].A if terms.learned else x if out is None else out
    dtype = compute_dtype(x, like.dtype)
    if out is None or make_weight or terms.learned or terms.low_rank or terms.constant:
        plan, factors = terms.plan(base.shape[1], dtype, make_weight, in_place)
        given = (out, x, bias, *factors)
        records = (plan.records or plan.noise) and torch.is_grad_enabled() and not is_tracing()
        if records and not any(tensor is not None and tensor.requires_grad for tensor in given):
            # A model's first layers, under dropout: backward has to come by, to record ⟨G, ε⟩.
            plan, x = replace(plan, skip_input_grad=True), x.detach().requires_grad_()
        out = (added if is_tracing() else Added.apply)(plan, out, x, weight, bias, *factors)
    for block, handle in terms.blocks:
        recorded = None if handle is None else handle.recorded
        out = add_blocks(BlockOptions(block.scaling, dtype), x, *stored_blocks(block.A, block.B), out, recorded)
    return out
