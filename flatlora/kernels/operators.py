"""Custom operators: what a graph needs of a perturbation and can't trace, seeds and what changes at each step.

A compiled graph is made once and runs at every step. Each time it runs it asks the layer's `GraphQuery` what it gets
now (`row_noise`, `low_rank_factors`); what it is told flows through it as tensors, so that a new ε, σ or ρ needs
no new graph, and backward sees the ε of its forward.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .draw import Draw, draw_gaussian, draw_low_rank
from .low_rank import without_autocast

__all__ = [
    "GraphNoise",
    "GraphQuery",
    "in_functorch",
    "is_tracing",
    "low_rank_factors",
    "noisy_product",
    "noisy_weight",
    "row_noise",
]

_NOTHING = -1  # the seed of no ε at all
_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, GraphQuery] = weakref.WeakValueDictionary()

# They call Python and read the host's memory, so a CUDA graph would replay one step's noise for ever.
_tag = getattr(torch.Tag, "cudagraph_unsafe", None)
_options: dict[str, Any] = {"mutates_args": (), **({} if _tag is None else {"tags": (_tag,)})}


def is_tracing() -> bool:
    """Whether a compiler or one of torch.func's transforms looks on, to which autograd functions are opaque."""
    return torch.compiler.is_compiling() or in_functorch()


def in_functorch() -> bool:
    """Whether one of torch.func's transforms looks on, which would drop the tangents of an operator's inputs."""
    return torch._C._are_functorch_transforms_active()


@dataclass(frozen=True)
class GraphNoise:
    """A Gaussian `Draw` as a graph has it, its seed in a tensor on the CPU."""

    std: Tensor
    seed: Tensor


class GraphQuery:
    """Whom a graph asks what one layer gets at present. Graphs know it by `number`, a tensor, and so by their inputs.

    Args:
        ask: returns a `Draw`, or the factors ``(B, A)`` of an ε; None for no ε. It is told whether the graph records no
            gradients, so that its answer may have to depend on who runs it.
    """

    def __init__(self, ask: Callable[[bool], Draw | tuple[Tensor, Tensor] | None]):
        self.ask = ask
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        _sites[number] = self


@torch.library.custom_op(
    "flatlora::row_noise",
    schema="(Tensor site, bool unrecorded, int m, Device device, ScalarType dtype) -> (Tensor, Tensor)",
    **_options,
)
def row_noise(
    site: Tensor, unrecorded: bool, m: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The standard deviations (m,) of the rows of a layer's Gaussian ε at present, and its seed, on the CPU."""
    draw = _sites[int(site)].ask(unrecorded)
    if not isinstance(draw, Draw):
        return torch.zeros(m, device=device, dtype=dtype), torch.tensor(_NOTHING, device="cpu")
    return draw.std.to(device, dtype, copy=True), torch.tensor(draw.seed, device="cpu")


@row_noise.register_fake
def _(site: Tensor, unrecorded: bool, m: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(m, device=device, dtype=dtype), torch.empty((), device="cpu", dtype=torch.int64)


@torch.library.custom_op(
    "flatlora::low_rank_factors",
    schema="(Tensor site, bool unrecorded, int[] b_shape, int[] a_shape, Device device, ScalarType dtype)"
    " -> (Tensor B, Tensor A)",
    **_options,
)
def low_rank_factors(
    site: Tensor,
    unrecorded: bool,
    b_shape: Sequence[int],
    a_shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The factors (B, A) of a layer's low-rank ε at present, with zeros up to the given shapes."""
    whole = torch.zeros(*b_shape, device=device, dtype=dtype), torch.zeros(*a_shape, device=device, dtype=dtype)
    found = _sites[int(site)].ask(unrecorded)
    factors = draw_low_rank(found, a_shape[-1], dtype) if isinstance(found, Draw) else found or ()
    for target, factor in zip(whole, factors, strict=False):
        if factor.dim() != target.dim() or any(n > most for n, most in zip(factor.shape, target.shape, strict=True)):
            raise RuntimeError(
                f"a perturbation has a factor of shape {tuple(factor.shape)}, and the compiled graph was made for "
                f"{tuple(target.shape)}: other adapters were trained in the step before. Call torch.compiler.reset()"
            )
        target[tuple(slice(n) for n in factor.shape)] = factor
    return whole


@low_rank_factors.register_fake
def _(
    site: Tensor,
    unrecorded: bool,
    b_shape: Sequence[int],
    a_shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return torch.empty(*b_shape, device=device, dtype=dtype), torch.empty(*a_shape, device=device, dtype=dtype)


@torch.library.custom_op(
    "flatlora::noisy_weight",
    schema="(Tensor? weight, Tensor std, Tensor seed, int n, ScalarType dtype) -> Tensor",
    **_options,
)
def noisy_weight(weight: Tensor | None, std: Tensor, seed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """``W + ε`` (m, n), ε alone where the weight is None: for torch.func's transforms, which know products."""
    return _noisy_weight(weight, std, seed, n, dtype)


@noisy_weight.register_fake
def _(weight: Tensor | None, std: Tensor, seed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    return std.new_empty(std.shape[0], n, dtype=dtype)


def _noisy_weight(weight: Tensor | None, std: Tensor, seed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    if int(seed) != _NOTHING:
        return draw_gaussian(Draw("gaussian", std, int(seed)), n, weight, dtype)
    return std.new_zeros(std.shape[0], n, dtype=dtype) if weight is None else weight.to(dtype, copy=True)


@torch.library.custom_op(
    "flatlora::noisy_product",
    schema="(Tensor x, Tensor? weight, Tensor std, Tensor seed, int n, bool transposed) -> Tensor",
    **_options,
)
def noisy_product(x: Tensor, weight: Tensor | None, std: Tensor, seed: Tensor, n: int, transposed: bool) -> Tensor:
    """``x·(W + ε)ᵀ`` for x (..., n), or, `transposed`, ``x·(W + ε)`` for x (..., m); ``W = 0`` where it is None.

    W + ε (m, n) is in the dtype of x and lives during this product alone: backward, which is the other of the two
    products, draws it again. So there are gradients of gradients too.
    """
    with torch.no_grad(), without_autocast(x.device):
        W = _noisy_weight(weight, std, seed, n, x.dtype)
        return x @ (W if transposed else W.t())


@noisy_product.register_fake
def _(x: Tensor, weight: Tensor | None, std: Tensor, seed: Tensor, n: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], n if transposed else std.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, std, seed, ctx.n, ctx.transposed = inputs
    ctx.save_for_backward(weight, std, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, std, seed = ctx.saved_tensors
    return noisy_product(grad, weight, std, seed, ctx.n, not ctx.transposed), None, None, None, None, None


noisy_product.register_autograd(_backward, setup_context=_setup)
