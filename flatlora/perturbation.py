"""The one mechanism that adds a training-time perturbation to an adapted layer.

A perturbed layer computes ``x·(W' + ε)ᵀ`` and its exact gradients. Its `forward` is replaced on the instance; where the
layer is a plain LoRA layer the adapter's small matmuls are fused on the way, and in every other case the layer's own
`forward` runs untouched and ``x·εᵀ`` is added to what it returns. No weight is ever written to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class _NoisyLinear(torch.autograd.Function):
    """``x·(W0 + ε)ᵀ + bias`` with full Gaussian ε. W0 + ε lives during each of the two matmuls only.

    `weight` is W0 if it is stored as a float tensor; for a quantised base it is None and `layer` dequantises it; with
    `alone` there is no W0 at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        layer: LoRALayer,
        draw: Draw,
        alone: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.layer, ctx.draw, ctx.alone, ctx.dtype, ctx.x_dtype = layer, draw, alone, dtype, x.dtype
        ctx.save_for_backward(weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), _NoisyLinear.perturbed(ctx, weight), None if bias is None else bias.to(dtype))

    @staticmethod
    def perturbed(ctx: Any, weight: Tensor | None) -> Tensor:
        if weight is None and not ctx.alone:
            weight = ctx.layer.base.dense(ctx.dtype)
        return draw_gaussian(ctx.draw, ctx.layer.shape[1], weight, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad.to(ctx.dtype) @ _NoisyLinear.perturbed(ctx, weight)).to(ctx.x_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, grad_bias, None, None, None, None


class _AddLowRank(torch.autograd.Function):
    """``out + Σ_k s_k·x·A_kᵀ·B_kᵀ + x·Aεᵀ·Bεᵀ`` through one pair of small matmuls.

    `factors` are A_1, B_1, A_2, B_2, …, which get gradients; `noise` is (Bε, Aε), which does not. PEFT launches two
    matmuls, a scaling and an addition for each pair and keeps an upcast copy of x for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        in_place: bool,
        dtype: torch.dtype,
        noise: tuple[Tensor, Tensor] | None,
        scalings: tuple[float, ...],
        *factors: Tensor,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a_parts = [a.to(dtype) for a in factors[0::2]]
            b_parts = [b.to(dtype) * s for b, s in zip(factors[1::2], scalings, strict=True)]
            if noise is not None:
                b_parts.append(noise[0])
                a_parts.append(noise[1])
            a = torch.cat(a_parts) if len(a_parts) > 1 else a_parts[0]
            b = torch.cat(b_parts, 1) if len(b_parts) > 1 else b_parts[0]
            h = x.reshape(-1, x.shape[-1]).to(dtype) @ a.t()
            ctx.save_for_backward(x, h, a, b)
            ctx.scalings, ctx.ranks = scalings, [part.shape[0] for part in factors[0::2]]
            if in_place and out.dtype == dtype:
                ctx.mark_dirty(out)
                out.view(-1, out.shape[-1]).addmm_(h, b.t())
                return out
            flat = out.reshape(-1, out.shape[-1])
            added = torch.addmm(flat, h, b.t()) if out.dtype == dtype else (flat + h @ b.t()).to(out.dtype)
            return added.view(out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, h, a, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]).to(h.dtype)
        gh = g @ b
        grad_x = (gh @ a).to(x.dtype).view(x.shape) if ctx.needs_input_grad[1] else None
        grads: list[Tensor | None] = [None] * (2 * len(ctx.ranks))
        if any(ctx.needs_input_grad[6:]):
            r = sum(ctx.ranks)
            grad_a = gh[:, :r].t() @ x.reshape(-1, x.shape[-1]).to(h.dtype)
            grad_b = g.t() @ h[:, :r]
            grads[0::2] = grad_a.split(ctx.ranks)
            grads[1::2] = [part * s for part, s in zip(grad_b.split(ctx.ranks, 1), ctx.scalings, strict=True)]
        return grad, grad_x, None, None, None, None, *grads


add_low_rank = _AddLowRank.apply


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
        if self._own_forward is None and len(args) + len(kwargs) == 1 and _fusable(self.layer, adapters):
            return self._fused(x, extra, adapters)
        out = self.original(*args, **kwargs)
        if isinstance(extra, Draw) and extra.kind == "gaussian":
            dtype = compute_dtype(x, out.dtype)
            return out + _NoisyLinear.apply(x, None, None, self.layer, extra, True, dtype).to(out.dtype)
        return self._add_low_rank(out, x, [], extra, in_place=False)

    def _fused(self, x: Tensor, extra: Draw | Adapter, adapters: list[Adapter]) -> Tensor:
        base = self.layer.base
        if isinstance(extra, Draw) and extra.kind == "gaussian":
            weight = base.float_weight() if base.kind == "float" else None
            dtype = weight.dtype if weight is not None else getattr(base.module, "compute_dtype", None) or x.dtype
            bias = getattr(base.module, "bias", None)
            out = _NoisyLinear.apply(x, weight, bias, self.layer, extra, False, compute_dtype(x, dtype))
            if weight is None:
                out = out.to(x.dtype)  # as bitsandbytes' layers return it
        else:
            out = base.module(x)
        in_place = not out._is_view()  # as of Conv1D and bitsandbytes; autograd forbids writing to those
        if hasattr(self.layer.module, "add_update"):  # GraLoRALinear adds its blocks to whatever base output
            out = self.layer.module.add_update(out, x, in_place)
            return self._add_low_rank(out, x, [], extra, in_place)
        plain = [adapter for adapter in adapters if isinstance(adapter.dropout, nn.Identity)]
        out = self._add_low_rank(out, x, plain, extra, in_place)
        if len(plain) < len(adapters):
            # Dropout draws from the global stream: cast before it as PEFT does, so that it draws the same.
            if base.kind == "float" or not torch.is_autocast_enabled(x.device.type):
                x = x.to(adapters[0].A.dtype)
            for adapter in adapters:
                if adapter.dropout is not None and not isinstance(adapter.dropout, nn.Identity):
                    out = self._add_low_rank(out, adapter.dropout(x), [adapter], None, in_place)
        return out

    def _add_low_rank(
        self, out: Tensor, x: Tensor, adapters: list[Adapter], extra: Draw | Adapter | None, in_place: bool
    ) -> Tensor:
        noise = None
        if isinstance(extra, Adapter):
            adapters = [*adapters, extra]
        dtype = compute_dtype(x, adapters[0].A.dtype if adapters else out.dtype)
        if isinstance(extra, Draw) and extra.kind == "low_rank":
            noise = draw_low_rank(extra, self.layer.shape[1], dtype)
        if not adapters and noise is None:
            return out
        factors = [factor for adapter in adapters for factor in (adapter.A, adapter.B)]
        return _AddLowRank.apply(out, x, in_place, dtype, noise, tuple(a.scaling for a in adapters), *factors)


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


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


def _fusable(layer: LoRALayer, adapters: list[Adapter]) -> bool:
    """Whether the layer is GraLoRALinear or PEFT's plain LoRA over a known base, with nobody listening in on parts."""
    module: Any = layer.module
    base = layer.base
    if base.kind == "opaque" or base.trainable or not base.plain or _hooked(base.module):
        return False
    if hasattr(module, "add_update"):
        return True
    if not layer.is_peft or not adapters or type(module).forward not in _peft_linear_forwards():
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
