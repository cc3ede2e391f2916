"""The one mechanism that adds a training-time perturbation to an adapted layer.

A perturbed layer computes ``x·(W' + ε)ᵀ`` and its exact gradients. Its `forward` is replaced on the instance; where the
layer is a plain LoRA layer the adapter's small matmuls are fused on the way, and in every other case the layer's own
`forward` runs untouched and ``x·εᵀ`` is added to what it returns. No weight is ever written to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base_weight import BaseWeight
from .layers import Adapter, LoRALayer

__all__ = ["Draw", "Perturbation", "draw_gaussian", "draw_low_rank", "remove_perturbation"]


@dataclass(frozen=True)
class Draw:
    """One ε of a layer: everything needed to form it again, and nothing of its size.

    Row i of ε has standard deviation ``std[i]`` per element. ``"gaussian"`` draws every element independently;
    ``"low_rank"`` is ``diag(std)·U·V/√rank`` with standard normal U (m, rank) and V (rank, n), whose covariance is the
    same.
    """

    kind: Literal["gaussian", "low_rank"]
    std: Tensor
    seed: int
    rank: int = 0


class Source(Protocol):
    """What decides a layer's perturbation at each forward."""

    def draw(self, layer: LoRALayer) -> Draw | Adapter | None:
        """The ε for this forward of `layer`, drawn or as an adapter that gets gradients; None to leave it alone.

        The same for a whole optimizer step.
        """


def _generator(draw: Draw) -> torch.Generator:
    return torch.Generator(draw.std.device).manual_seed(draw.seed)


def _normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    # Half precision would cost the noise its tails; it is drawn in float32 and rounded once, after scaling.
    dtype = dtype if dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(generator=generator)


def draw_gaussian(draw: Draw, n: int, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``W + ε`` of shape (m, n) in a new tensor of `dtype`, or ε alone where `weight` is None."""
    noise = _normal((draw.std.shape[0], n), _generator(draw), dtype)
    std = draw.std.to(noise.dtype).unsqueeze(1)
    if weight is None:
        noise.mul_(std)
    else:
        torch.addcmul(weight, noise, std, out=noise)
    return noise.to(dtype)


def draw_low_rank(draw: Draw, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors ``(B, A)`` of ``ε = B·A``, shapes (m, rank) and (rank, n)."""
    generator = _generator(draw)
    u = _normal((draw.std.shape[0], draw.rank), generator, dtype)
    v = _normal((draw.rank, n), generator, dtype)
    u.mul_((draw.std * draw.rank**-0.5).to(u.dtype).unsqueeze(1))
    return u.to(dtype), v.to(dtype)


def product_of(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """``x·Wᵀ + bias`` in the dtype of W and in a tensor of its own.

    `F.linear` may return a view, which autograd forbids others to write to once a custom function has returned it.
    """
    out = torch.empty(*x.shape[:-1], W.shape[0], dtype=W.dtype, device=W.device)
    flat, rows = x.reshape(-1, x.shape[-1]).to(W.dtype), out.view(-1, W.shape[0])
    if bias is None:
        torch.mm(flat, W.t(), out=rows)
    else:
        torch.addmm(bias.to(W.dtype), flat, W.t(), out=rows)
    return out


class _Added(torch.autograd.Function):
    """``out + x·Wᵀ + bias + Σ_k s_k·x·A_kᵀ·B_kᵀ + x·Aεᵀ·Bεᵀ``, of which any part may be missing.

    W (m, n), such as W0 + ε, lives during each of its two matmuls only: `matrix(weight)` makes it, and makes it again
    for backward; `weight` is the stored tensor that it is made from, or None. `factors` are A_1, B_1, A_2, B_2, …,
    which get gradients; `noise` is (Bε, Aε), which does not. All low-rank terms go through one pair of small matmuls in
    `dtype`, added in place, where PEFT launches two, a scaling and an addition for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor | None,
        in_place: bool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        matrix: Callable[[Any], Tensor] | None,
        noise: tuple[Tensor, Tensor] | None,
        dtype: torch.dtype,
        scalings: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        ctx.matrix, ctx.scalings, ctx.ranks = matrix, scalings, [A.shape[0] for A in factors[0::2]]
        ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
        given, h, a, b = out, None, None, None
        with torch.autocast(x.device.type, enabled=False):
            if matrix is not None:
                W = matrix(weight)
                product = product_of(x, W, bias)
                # bitsandbytes' layers, whose weight is no float tensor, return the dtype they were given.
                if out is not None:
                    out = out + product.to(out.dtype)
                else:
                    out = product.to(x.dtype if weight is None else W.dtype)
                del W, product
            assert out is not None
            if factors or noise is not None:
                a_parts = [A.to(dtype) for A in factors[0::2]]
                b_parts = [B.to(dtype) * s for B, s in zip(factors[1::2], scalings, strict=True)]
                if noise is not None:
                    b_parts.append(noise[0])
                    a_parts.append(noise[1])
                a = torch.cat(a_parts) if len(a_parts) > 1 else a_parts[0]
                b = torch.cat(b_parts, 1) if len(b_parts) > 1 else b_parts[0]
                h = x.reshape(-1, x.shape[-1]).to(dtype) @ a.t()
                flat = rows = out.reshape(-1, out.shape[-1])
                if not (out.is_contiguous() and (in_place or out is not given)):
                    out = torch.empty(out.shape, dtype=out.dtype, device=out.device)
                    rows = out.view(flat.shape)
                if out.dtype != dtype:
                    rows.copy_(flat + h @ b.t())
                elif rows is flat:
                    rows.addmm_(h, b.t())
                else:
                    torch.addmm(flat, h, b.t(), out=rows)
            if out is given:
                ctx.mark_dirty(out)
        ctx.save_for_backward(weight, a, b, *((x, h) if any(ctx.needs_input_grad[9:]) else (None, None)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, a, b, x, h = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        grads: list[Tensor | None] = [None] * (2 * len(ctx.ranks))
        with torch.autocast(grad.device.type, enabled=False):
            grad_bias = g.sum(0) if ctx.needs_input_grad[4] else None
            if ctx.needs_input_grad[2] and ctx.matrix is not None:
                W = ctx.matrix(weight)
                grad_x = g.to(W.dtype) @ W
                del W
            if a is not None:
                g = g.to(a.dtype)
                gh = g @ b
                if ctx.needs_input_grad[2]:
                    grad_x = gh @ a if grad_x is None else grad_x.to(a.dtype).addmm_(gh, a)
                if x is not None:
                    r = sum(ctx.ranks)
                    grad_a = gh[:, :r].t() @ x.reshape(-1, x.shape[-1]).to(h.dtype)
                    grad_b = g.t() @ h[:, :r]
                    grads[0::2] = grad_a.split(ctx.ranks)
                    grads[1::2] = [part * s for part, s in zip(grad_b.split(ctx.ranks, 1), ctx.scalings, strict=True)]
        if grad_x is not None:
            grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
        return grad if ctx.needs_input_grad[0] else None, None, grad_x, None, grad_bias, None, None, None, None, *grads


def add_low_rank(
    out: Tensor, x: Tensor, in_place: bool, dtype: torch.dtype, scalings: tuple[float, ...], *factors: Tensor
) -> Tensor:
    """``out + Σ_k s_k·x·A_kᵀ·B_kᵀ`` for the factors A_1, B_1, …; into `out` itself if `in_place`."""
    return _Added.apply(out, in_place, x, None, None, None, None, dtype, scalings, *factors)


class Perturbation:
    """Stands in for one layer's `forward` from `attach()` to `remove()`.

    Whether and how a call is perturbed is the source's word; unless it draws, the layer's own `forward` is called.
    """

    def __init__(self, layer: LoRALayer, source: Source):
        self.layer = layer
        self.source = source
        self.attached = False
        self._own_forward: Any = None  # an instance's forward that was there before, such as another library's patch

    def attach(self) -> None:
        self.attached = True
        self._own_forward = self.layer.module.__dict__.get("forward")
        self.layer.module.forward = self.forward

    def remove(self) -> None:
        self.attached = False
        module = self.layer.module
        if getattr(module.__dict__.get("forward"), "__self__", None) is not self:
            return  # someone patched the layer on top: stay in line, as the layer's own forward
        if self._own_forward is None:
            del module.forward
        else:
            module.forward = self._own_forward

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self._own_forward is not None:
            return self._own_forward(*args, **kwargs)
        return type(self.layer.module).forward(self.layer.module, *args, **kwargs)

    @torch.compiler.disable  # generators and seeds are Python's; compiled models break the graph here
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        extra = self.source.draw(self.layer) if self.attached else None
        if extra is None:
            return self.original(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        adapters = self.layer.adapters()
        if self._own_forward is None and len(args) + len(kwargs) == 1 and _fusable(self.layer, adapters, x):
            return self._fused(x, extra, adapters)
        out = self.original(*args, **kwargs)
        if not _is_gaussian(extra):
            return self._add(out, x, [], extra)
        return self._add(out, x, [], None, matrix=self._noisy(extra, compute_dtype(x, out.dtype), alone=True))

    def _fused(self, x: Tensor, extra: Draw | Adapter, adapters: list[Adapter]) -> Tensor:
        base = self.layer.base
        weight = base.float_weight() if base.kind == "float" else None
        like = weight.dtype if weight is not None else getattr(base.module, "compute_dtype", None) or x.dtype
        dtype = compute_dtype(x, like)
        # GraLoRALinear adds its blocks to whatever base output, dropout what it lets through.
        blocks = getattr(self.layer.module, "add_update", None)
        plain = [] if blocks else [adapter for adapter in adapters if isinstance(adapter.dropout, nn.Identity)]
        bias = getattr(base.module, "bias", None)
        if _is_gaussian(extra):
            out = self._add(None, x, plain, None, weight, bias, self._noisy(extra, dtype))
        elif weight is not None:
            out = self._add(None, x, plain, extra, weight, bias, lambda stored: stored.to(dtype))
        else:
            out = base.module(x)
            # Autograd forbids writing to views, such as bitsandbytes' outputs.
            out = self._add(out, x, plain, extra, in_place=not out._is_view())
        if blocks:
            return blocks(out, x, True)
        if len(plain) < len(adapters):
            # Dropout draws from the global stream: cast before it as PEFT does, so that it draws the same.
            if base.kind == "float" or not torch.is_autocast_enabled(x.device.type):
                x = x.to(adapters[0].A.dtype)
            for adapter in adapters:
                if adapter.dropout is not None and not isinstance(adapter.dropout, nn.Identity):
                    out = self._add(out, adapter.dropout(x), [adapter], None, in_place=True)
        return out

    def _noisy(self, draw: Draw, dtype: torch.dtype, alone: bool = False) -> Callable[[Tensor | None], Tensor]:
        """What makes W0 + ε, or ε `alone`, from the stored weight or, without one, from the quantised."""

        def make(weight: Tensor | None) -> Tensor:
            if weight is None and not alone:
                weight = self.layer.base.dense(dtype)
            return draw_gaussian(draw, self.layer.shape[1], weight, dtype)

        return make

    def _add(
        self,
        out: Tensor | None,
        x: Tensor,
        adapters: list[Adapter],
        extra: Draw | Adapter | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        matrix: Callable[[Any], Tensor] | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """`_Added` of these adapters and, unless it is None, of `extra`, which is not Gaussian."""
        if isinstance(extra, Adapter):
            adapters = [*adapters, extra]
        like = adapters[0].A if adapters else x if out is None else out
        dtype = compute_dtype(x, like.dtype)
        noise = draw_low_rank(extra, self.layer.shape[1], dtype) if isinstance(extra, Draw) else None
        factors = [factor for adapter in adapters for factor in (adapter.A, adapter.B)]
        scalings = tuple(adapter.scaling for adapter in adapters)
        return _Added.apply(out, in_place, x, weight, bias, matrix, noise, dtype, scalings, *factors)


def _is_gaussian(extra: Draw | Adapter) -> TypeGuard[Draw]:
    return isinstance(extra, Draw) and extra.kind == "gaussian"


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or autocast's where it is on, which leaves float64 alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and dtype != torch.float64 else dtype


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@functools.cache
def _peft_linear_forwards() -> frozenset[Any]:
    from peft.tuners.lora import bnb, layer

    kinds = [layer.Linear, getattr(bnb, "Linear4bit", None), getattr(bnb, "Linear8bitLt", None)]
    return frozenset(kind.forward for kind in kinds if kind is not None)


def is_transparent(base: BaseWeight, x: Tensor) -> bool:
    """Whether ``x·W0ᵀ + bias`` may stand for the base's forward: it is frozen, known, and nobody listens in on it.

    Nor would it refuse x, as a float layer does one of another dtype.
    """
    if base.trainable or not base.plain or _hooked(base.module):
        return False
    return base.kind != "float" or x.dtype == base.module.weight.dtype or torch.is_autocast_enabled(x.device.type)


def _fusable(layer: LoRALayer, adapters: list[Adapter], x: Tensor) -> bool:
    """Whether the layer is GraLoRALinear or PEFT's plain LoRA right over a known base, with nobody listening in."""
    module: Any = layer.module
    if not is_transparent(layer.base, x):
        return False
    if hasattr(module, "add_update"):
        return True
    if not layer.is_peft or not adapters or type(module).forward not in _peft_linear_forwards():
        return False
    if module.base_layer is not layer.base.module:  # but another adapter's layer
        return False
    for adapter in adapters:
        name = adapter.name
        if name in module.lora_variant or module.lora_bias[name] or adapter.A.dtype != adapters[0].A.dtype:
            return False
        factors = (module.lora_A[name], module.lora_B[name])
        if any(type(part) is not nn.Linear or _hooked(part) for part in factors) or _hooked(module.lora_dropout[name]):
            return False
    return True


def stacked(module: nn.Module) -> Iterator[Perturbation]:
    """The perturbations that stand in for a module's forward, outermost first."""
    forward = module.__dict__.get("forward")
    while isinstance(owner := getattr(forward, "__self__", None), Perturbation):
        yield owner
        forward = owner._own_forward


def remove_perturbation(model: nn.Module) -> None:
    """Takes every perturbation of this library off `model`, also those whose optimizer is gone. Idempotent."""
    for module in model.modules():
        for perturbation in list(stacked(module)):
            perturbation.remove()
