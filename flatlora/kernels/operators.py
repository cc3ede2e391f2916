"""Custom operators: what a graph needs of a perturbation and can't trace, seeds and what changes at each step.

A compiled graph is made once and runs at every step. Each time it runs, the layer's `LayerHandle` gives it the
present ε (`row_noise`, `low_rank_factors`) as tensors. So a new ε, σ or ρ needs no new graph, and backward sees the ε
of its forward.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .draw import Draw, draw_gaussian, draw_low_rank, rise_of
from .low_rank import without_autocast

_NOTHING = -1  # the seed of no ε at all
_numbers = itertools.count()
_handles: weakref.WeakValueDictionary[int, LayerHandle] = weakref.WeakValueDictionary()

# They call Python and read the host's memory, so a CUDA graph would replay one step's noise for ever.
_tag = getattr(torch.Tag, "cudagraph_unsafe", None)
_operator: Any = partial(torch.library.custom_op, mutates_args=(), **({} if _tag is None else {"tags": (_tag,)}))


def is_tracing() -> bool:
    """Whether a compiler or one of torch.func's transforms traces, to which autograd functions are opaque."""
    return torch.compiler.is_compiling() or in_functorch()


def in_functorch() -> bool:
    """Whether one of torch.func's transforms traces, which would drop the tangents of an operator's inputs."""
    return torch._C._are_functorch_transforms_active()


@dataclass(frozen=True)
class GraphNoise:
    """A Gaussian `Draw` as a graph has it, its seed in a tensor on the CPU."""

    std: Tensor
    seed: Tensor


class LayerHandle(ABC):
    """What perturbs one layer, as graphs and backward passes reach it.

    A graph knows it by `number`, a tensor, and so by its inputs.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        # Has backward come by where nothing else in a product requires a gradient, as in a model's first layers.
        self._anchor = torch.zeros((), device="cpu", requires_grad=True)
        _handles[number] = self

    @abstractmethod
    def perturbation(self, unrecorded: bool) -> Draw | tuple[Tensor, Tensor] | None:
        """The ε of a graph that runs now, as a `Draw` or as factors ``(B, A)``; None for no ε.

        `unrecorded`: the graph records no gradients, so that the answer may depend on who runs it.
        """

    @abstractmethod
    def measures(self) -> bool:
        """Whether ``⟨G, ε⟩`` is wanted in this step."""

    @abstractmethod
    def record(self, part: Tensor) -> None:
        """Takes a backward pass's part of ``⟨G, ε⟩``, as `LossRise.record`."""

    def recorded(self, h: Tensor) -> Tensor:
        """``h = x·Aᵀ`` of the layer's ε, in a graph, whose backward records ``⟨G, ε⟩``."""
        return record_in_backward(self._anchor, self.number, h)


@_operator(
    "flatlora::row_noise",
    schema="(Tensor layer, bool unrecorded, int m, Device device, ScalarType dtype) -> (Tensor, Tensor)",
)
def row_noise(
    layer: Tensor, unrecorded: bool, m: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The standard deviations (m,) of the rows of a layer's Gaussian ε at present, and its seed, on the CPU."""
    draw = _handles[int(layer)].perturbation(unrecorded)
    if not isinstance(draw, Draw):
        return torch.zeros(m, device=device, dtype=dtype), torch.tensor(_NOTHING, device="cpu")
    return draw.std.to(device, dtype, copy=True), torch.tensor(draw.seed, device="cpu")


@_operator(
    "flatlora::low_rank_factors",
    schema="(Tensor layer, bool unrecorded, int[] b_shape, int[] a_shape, Device device, ScalarType dtype)"
    " -> (Tensor B, Tensor A)",
)
def low_rank_factors(
    layer: Tensor,
    unrecorded: bool,
    b_shape: Sequence[int],
    a_shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The factors (B, A) of a layer's low-rank ε at present, with zeros up to the given shapes."""
    whole = torch.zeros(*b_shape, device=device, dtype=dtype), torch.zeros(*a_shape, device=device, dtype=dtype)
    found = _handles[int(layer)].perturbation(unrecorded)
    factors = draw_low_rank(found, a_shape[-1], dtype) if isinstance(found, Draw) else found or ()
    for target, factor in zip(whole, factors, strict=False):
        if factor.dim() != target.dim() or any(n > most for n, most in zip(factor.shape, target.shape, strict=True)):
            raise RuntimeError(
                f"a perturbation has a factor of shape {tuple(factor.shape)}, and the compiled graph was made for "
                f"{tuple(target.shape)}: other adapters were trained in the step before. Call torch.compiler.reset()"
            )
        target[tuple(slice(n) for n in factor.shape)] = factor
    return whole


def _noisy_weight(weight: Tensor | None, std: Tensor, seed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """``W + ε`` (m, n), ε alone where the weight is None."""
    if int(seed) != _NOTHING:
        return draw_gaussian(Draw("gaussian", std, int(seed)), n, weight, dtype)
    return std.new_zeros(std.shape[0], n, dtype=dtype) if weight is None else weight.to(dtype, copy=True)


# For torch.func's transforms, which know products.
noisy_weight = _operator(
    "flatlora::noisy_weight",
    schema="(Tensor? weight, Tensor std, Tensor seed, int n, ScalarType dtype) -> Tensor",
)(_noisy_weight)


@_operator(
    "flatlora::noisy_product",
    schema="(Tensor x, Tensor? weight, Tensor std, Tensor seed, int n, bool transposed, Tensor? layer, Tensor? input)"
    " -> Tensor",
)
def noisy_product(
    x: Tensor,
    weight: Tensor | None,
    std: Tensor,
    seed: Tensor,
    n: int,
    transposed: bool,
    layer: Tensor | None,
    input: Tensor | None,
) -> Tensor:
    """``x·(W + ε)ᵀ`` for x (..., n), or, `transposed`, ``x·(W + ε)`` for x (..., m); ``W = 0`` where it is None.

    W + ε (m, n) is in the dtype of x and lives during this product alone: backward, which is the other of the two
    products, draws it again. So there are gradients of gradients too. With a `layer`, the number of a
    `LayerHandle`, backward gets the `input` of the former product too, and records ``⟨G, ε⟩``.
    """
    with torch.no_grad(), without_autocast(x.device):
        if layer is not None and input is not None and int(seed) != _NOTHING and _handles[int(layer)].measures():
            draw = Draw("gaussian", std, int(seed))
            _handles[int(layer)].record(rise_of(draw, input.reshape(-1, n), x.reshape(-1, x.shape[-1])))
        W = _noisy_weight(weight, std, seed, n, x.dtype)
        return x @ (W if transposed else W.t())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, std, seed, ctx.n, ctx.transposed, layer, _ = inputs
    ctx.save_for_backward(weight, std, seed, layer, None if layer is None else x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, std, seed, layer, x = ctx.saved_tensors
    return noisy_product(grad, weight, std, seed, ctx.n, not ctx.transposed, layer, x), *(None,) * 7


noisy_product.register_autograd(_backward, setup_context=_setup)


@_operator("flatlora::record_in_backward", schema="(Tensor anchor, Tensor layer, Tensor h) -> Tensor")
def record_in_backward(anchor: Tensor, layer: Tensor, h: Tensor) -> Tensor:
    """A copy of ``h = x·Aᵀ`` (..., R) of a layer's ε = B·A, whose backward records ``⟨G, ε⟩``."""
    return h.clone()


@_operator(
    "flatlora::record_rise",
    schema="(Tensor anchor, Tensor layer, Tensor h, Tensor grad) -> (Tensor, Tensor)",
)
def record_rise(anchor: Tensor, layer: Tensor, h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Records ``⟨G, ε⟩``. Returns the gradients of `record_in_backward` by its anchor, 0, and by h, a copy.

    They are what the graph needs of it; without them it would be left out.
    """
    handle = _handles[int(layer)]
    if handle.measures():
        handle.record(h.flatten(0, -2).t() @ grad.flatten(0, -2))
    return torch.zeros_like(anchor), grad.clone()


def _record(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    of_anchor, of_h = record_rise(*ctx.saved_tensors, grad)
    return of_anchor, None, of_h


record_in_backward.register_autograd(_record, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
record_rise.register_autograd(lambda ctx, _, grad: (None, None, None, grad))

# What compilers trace in the operators' place: outputs of the right shape, dtype and device.
row_noise.register_fake(
    lambda layer, unrecorded, m, device, dtype: (
        torch.empty(m, device=device, dtype=dtype),
        torch.empty((), device="cpu", dtype=torch.int64),
    )
)
low_rank_factors.register_fake(
    lambda layer, unrecorded, b_shape, a_shape, device, dtype: (
        torch.empty(*b_shape, device=device, dtype=dtype),
        torch.empty(*a_shape, device=device, dtype=dtype),
    )
)
noisy_weight.register_fake(lambda weight, std, seed, n, dtype: std.new_empty(std.shape[0], n, dtype=dtype))
noisy_product.register_fake(
    lambda x, weight, std, seed, n, transposed, layer, input: x.new_empty(
        *x.shape[:-1], n if transposed else std.shape[0]
    )
)
record_in_backward.register_fake(lambda anchor, layer, h: torch.empty_like(h))
record_rise.register_fake(lambda anchor, layer, h, grad: (torch.empty_like(anchor), torch.empty_like(grad)))
