"""A product with a weight and low-rank terms beside it, as one autograd function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or autocast's where it is on, which leaves float64 alone."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device) and dtype != torch.float64 else dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for `device`; there is none on the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off for `device`; it is entered in every layer, so none where none is needed."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Out of inference mode, which leaves tensors unfit for autograd, and of autocast, which rounds products."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
        yield


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, without the launch that `to` costs where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def product_of(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias`` in the dtype of W and in a tensor of its own.

    `F.linear` may return a view, which autograd forbids others to write to once a custom function has returned it.
    """
    m, n = W.shape
    out = torch.empty(*x.shape[:-1], m, dtype=W.dtype, device=W.device)
    flat, rows = cast(x.reshape(-1, n), W.dtype), out.view(-1, m)
    if bias is None:
        torch.mm(flat, W.t(), out=rows)
    else:
        torch.addmm(cast(bias, W.dtype), flat, W.t(), out=rows)
    return out


@dataclass(frozen=True)
class AddedTerms:
    """What `Added` adds up, beside the tensors that autograd has to see.

    Attributes:
        dtype: in which the low-rank terms are computed.
        scalings: s_k of each term, the learned ones first.
        constant: factors ``(B (m, k), A (k, n))`` of low-rank terms that get no gradient.
        grad_scale: what the gradients of each learned A and B are multiplied by.
        weight: makes W (m, n), such as W0 + ε, from the stored weight or from None; None if there is no such product.
            It is called in forward and again in backward, so that W lives during each of its two products alone.
        in_place: whether the output that is given may be written to.
        handles: of each term, the `LayerHandle` that records ``⟨G, s_k·B_k·A_k⟩`` in backward, or None; empty for none.
        noise: the handle of each noise in `weight`, and what makes the same of x (T, n) and ∂L/∂out (T, m).
        skip_input_grad: x requires a gradient only so that backward runs and records, and gets none.
    """

    dtype: torch.dtype
    scalings: tuple[float, ...] = ()
    constant: tuple[tuple[Tensor, Tensor], ...] = ()
    grad_scale: tuple[float, ...] = ()
    weight: Callable[[Any], Tensor] | None = None
    in_place: bool = False
    handles: tuple[Any, ...] = ()
    noise: tuple[tuple[Any, Callable[[Tensor, Tensor], Tensor]], ...] = ()
    skip_input_grad: bool = False

    @property
    def records(self) -> bool:
        return any(handle is not None for handle in self.handles)

    def record(self, h: Tensor, g: Tensor, learned: Sequence[int]) -> None:
        """Records ``⟨G, s·B·A⟩`` of each term with a handle: as ``hᵀ·g`` of its columns, whose trace it is."""
        if self.records and h.dtype == torch.float16:  # in which a scaled loss's sum would overflow
            h, g = h.float(), g.float()
        start = 0
        for handle, rank in zip(self.handles, self.ranks(learned), strict=False):
            if handle is not None:
                handle.record(h.narrow(1, start, rank).t() @ g.narrow(1, start, rank))
            start += rank

    def record_noise(self, x: Tensor, g: Tensor) -> None:
        """The same of Gaussian draws, each by a product of its own."""
        for handle, rise in self.noise:
            handle.record(rise(x.reshape(-1, x.shape[-1]), g))

    def factors(self, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """All terms as one, but for their scalings: the factors A (R, n) and B (m, R), the learned ones first."""
        a = [cast(A, self.dtype) for A in learned[0::2]] + [A for _, A in self.constant]
        b = [cast(B, self.dtype) for B in learned[1::2]] + [B for B, _ in self.constant]
        return torch.cat(a) if len(a) > 1 else a[0], torch.cat(b, 1) if len(b) > 1 else b[0]

    def ranks(self, learned: Sequence[int]) -> list[int]:
        """The rank of each term; those of the learned ones are given."""
        return [*learned, *(A.shape[0] for _, A in self.constant)]

    def scale(self, h: Tensor, learned: Sequence[int]) -> None:
        """Multiplies the columns of h (T, R), which are smaller than A and B, by the s_k of their terms.

        One launch for neighbours of one s_k, as Bi-LoRA's adapters often are.
        """
        start = 0
        for factor, terms in groupby(zip(self.scalings, self.ranks(learned), strict=True), key=itemgetter(0)):
            width = sum(rank for _, rank in terms)
            if factor != 1.0:
                h.narrow(1, start, width).mul_(factor)
            start += width


def added(
    plan: AddedTerms, out: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, *learned: Tensor
) -> Tensor:
    """What `Added` computes, in plain operations: its reference."""
    if plan.weight is not None:
        W = plan.weight(weight)
        product = torch.nn.functional.linear(cast(x, W.dtype), W, None if bias is None else cast(bias, W.dtype))
        out = product if out is None else out + product
    assert out is not None
    if learned or plan.constant:
        kept = [scale_grad(factor, plan.grad_scale[i // 2]) for i, factor in enumerate(learned)]
        a, b = plan.factors(kept)
        ranks = plan.ranks(_ranks(learned))
        b = torch.cat([B * s for B, s in zip(b.split(ranks, 1), plan.scalings, strict=True)], 1)
        h = x.to(plan.dtype) @ a.t()
        if plan.records:
            parts = zip(h.split(ranks, -1), plan.handles, strict=True)
            h = torch.cat([part if handle is None else handle.recorded(part) for part, handle in parts], -1)
        out = out + (h @ b.t()).to(out.dtype)
    return out


def scale_grad(tensor: Tensor, factor: float) -> Tensor:
    """The tensor as it is, to the bit, whose gradient is multiplied by `factor`."""
    return tensor if factor == 1.0 else tensor.detach() + factor * (tensor - tensor.detach())


def _ranks(learned: Sequence[Tensor]) -> list[int]:
    return [A.shape[0] for A in learned[0::2]]


class Added(torch.autograd.Function):
    """``out + x·Wᵀ + bias + Σ_k s_k·x·A_kᵀ·B_kᵀ``, of which any part may be missing.

    `learned` are the adapters' A_1, B_1, A_2, B_2 and so on, which get gradients; `plan` says the rest. All low-rank
    terms go through one pair of small products, added in place, where PEFT launches two, a scaling and an addition for
    each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: AddedTerms,
        out: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *learned: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.ranks = plan, _ranks(learned)
        ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
        result, a, b, h = out, None, None, None
        with without_autocast(x.device):
            if plan.weight is not None:
                result = _with_product(plan, out, x, weight, bias)
            assert result is not None
            if learned or plan.constant:
                a, b = plan.factors(learned)
                h = cast(x.reshape(-1, x.shape[-1]), plan.dtype) @ a.t()
                plan.scale(h, ctx.ranks)
                result = _plus_product(result, h, b, writable=plan.in_place or result is not out)
        if result is out:
            ctx.mark_dirty(out)
        # The adapters' own parameters are kept to be looked at: autograd refuses them if they have moved since.
        trained = any(ctx.needs_input_grad[5:])
        kept = (x if trained or plan.noise else None, h if trained or plan.records else None)
        ctx.save_for_backward(weight, a, b, *kept, *learned)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # `create_graph`
            return _differentiable(ctx, grad)
        weight, a, b, x, h, *learned = ctx.saved_tensors
        plan, of_x = ctx.plan, ctx.needs_input_grad[2] and not ctx.plan.skip_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        grads: list[Tensor | None] = [None] * (2 * len(ctx.ranks))
        with without_autocast(grad.device):
            grad_bias = g.sum(0) if ctx.needs_input_grad[4] else None
            plan.record_noise(x, g)
            if of_x and plan.weight is not None:
                W = plan.weight(weight)
                grad_x = cast(g, W.dtype) @ W
                del W
            if a is not None:
                g = cast(g, a.dtype)
                gh = g @ b
                plan.record(h, gh, ctx.ranks)
                plan.scale(gh, ctx.ranks)
                if of_x and grad_x is None:
                    grad_x = gh @ a
                elif grad_x is not None and ctx.x_dtype == grad_x.dtype != a.dtype:
                    grad_x.add_(gh @ a)  # in the wider dtype, and rounded once
                elif grad_x is not None:
                    grad_x = cast(grad_x, a.dtype).addmm_(gh, a)
                if ctx.ranks and x is not None:
                    r = sum(ctx.ranks)
                    grad_a = gh[:, :r].t() @ cast(x.reshape(-1, x.shape[-1]), h.dtype)
                    grad_b = g.t() @ h[:, :r]
                    one = len(ctx.ranks) == 1
                    grads[0::2] = (grad_a,) if one else grad_a.split(ctx.ranks)
                    grads[1::2] = (grad_b,) if one else grad_b.split(ctx.ranks, 1)
                    for i, (grad_p, p) in enumerate(zip(list(grads), learned, strict=True)):
                        if grad_p is not None and (factor := plan.grad_scale[i // 2]) != 1.0:
                            grads[i] = cast(grad_p, p.dtype) * factor  # in autocast's float16 it might vanish
        if grad_x is not None:
            grad_x = cast(grad_x, ctx.x_dtype).view(ctx.x_shape)
        return None, grad if ctx.needs_input_grad[1] else None, grad_x, None, grad_bias, *grads


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """What `Added.backward` returns, by autograd of its plain reference, so that it can be differentiated again."""
    weight, a, b, x, h, *learned = ctx.saved_tensors
    with torch.no_grad(), without_autocast(grad.device):
        g = grad.reshape(-1, grad.shape[-1])
        ctx.plan.record_noise(x, g)
        if ctx.plan.records:
            ctx.plan.record(h, cast(g, a.dtype) @ b, ctx.ranks)
    if x is None:  # of whose values its own gradient does not depend
        x = torch.zeros(ctx.x_shape, dtype=ctx.x_dtype, device=grad.device, requires_grad=True)
    places = [i for i, needed in enumerate(ctx.needs_input_grad) if needed and i not in (1, 3, 4)]
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    with without_autocast(grad.device):
        out = added(replace(ctx.plan, handles=()), torch.zeros_like(grad), x, weight, None, *learned)
        inputs = [x if i == 2 else learned[i - 5] for i in places]
        found = torch.autograd.grad(out, inputs, grad.to(out.dtype), create_graph=True) if inputs else ()
    for i, one in zip(places, found, strict=True):
        grads[i] = one
    grads[1] = grad if ctx.needs_input_grad[1] else None
    grads[4] = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
    return tuple(grads)


def _with_product(
    plan: AddedTerms, out: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``out + x·Wᵀ + bias`` in a new tensor."""
    assert plan.weight is not None
    W = plan.weight(weight)
    product = product_of(x, W, bias)
    if out is not None:
        return out + cast(product, out.dtype)
    # bitsandbytes' layers, whose weight is no float tensor, return the dtype they were given.
    return cast(product, x.dtype if weight is None else W.dtype)


def _plus_product(out: Tensor, h: Tensor, b: Tensor, writable: bool) -> Tensor:
    """``out + h·bᵀ``, in `out` itself where it may be written to."""
    flat = out.reshape(-1, out.shape[-1])
    if writable and out.is_contiguous():
        target, rows = out, flat
    else:
        target = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        rows = target.view(flat.shape)
    if out.dtype != h.dtype:
        torch.add(flat, h @ b.t(), out=rows)  # in the wider dtype, and rounded once
    elif target is out:
        rows.addmm_(h, b.t())
    else:
        torch.addmm(flat, h, b.t(), out=rows)
    return target


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias`` of a frozen W (m, n); autocast's copy of W is made again for backward, and not kept till then."""
    dtype = compute_dtype(x, weight.dtype)
    return Added.apply(AddedTerms(dtype, weight=lambda stored: cast(stored, dtype)), None, x, weight, bias)


def add_low_rank(
    out: Tensor, x: Tensor, in_place: bool, dtype: torch.dtype, scalings: tuple[float, ...], *learned: Tensor
) -> Tensor:
    """``out + Σ_k s_k·x·A_kᵀ·B_kᵀ`` for the factors A_1, B_1 and so on; into `out` itself if `in_place`."""
    plan = AddedTerms(dtype, scalings, grad_scale=(1.0,) * len(scalings), in_place=in_place)
    return Added.apply(plan, out, x, None, None, *learned)
