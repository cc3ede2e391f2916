"""The one mechanism that adds a training-time perturbation to an adapted layer.

A perturbed layer computes ``x·(W' + ε)ᵀ`` and its exact gradients. Its `forward` is replaced on the instance; where the
layer is a plain LoRA layer the adapter's small matmuls are fused on the way, and in every other case the layer's own
`forward` runs untouched and ``x·εᵀ`` is added to what it returns. No weight is ever written to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from .kernels.draw import Draw, draw_gaussian, draw_low_rank
from .kernels.low_rank import Added, compute_dtype
from .layers.adapter import Adapter
from .layers.base import hooked
from .layers.view import LoRALayer

__all__ = ["Perturbation", "remove_perturbation", "stacked"]


class Source(Protocol):
    """What decides a layer's perturbation at each forward."""

    def draw(self, layer: LoRALayer) -> Draw | Adapter | None:
        """The ε for this forward of `layer`, drawn or as an adapter that gets gradients; None to leave it alone.

        The same for a whole optimizer step.
        """


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
        """`Added` of these adapters and, unless it is None, of `extra`, which is not Gaussian."""
        if isinstance(extra, Adapter):
            adapters = [*adapters, extra]
        like = adapters[0].A if adapters else x if out is None else out
        dtype = compute_dtype(x, like.dtype)
        noise = draw_low_rank(extra, self.layer.shape[1], dtype) if isinstance(extra, Draw) else None
        factors = [factor for adapter in adapters for factor in (adapter.A, adapter.B)]
        scalings = tuple(adapter.scaling for adapter in adapters)
        return Added.apply(out, in_place, x, weight, bias, matrix, noise, dtype, scalings, *factors)


def _is_gaussian(extra: Draw | Adapter) -> TypeGuard[Draw]:
    return isinstance(extra, Draw) and extra.kind == "gaussian"


@functools.cache
def _peft_linear_forwards() -> frozenset[Any]:
    from peft.tuners.lora import bnb, layer

    kinds = [layer.Linear, getattr(bnb, "Linear4bit", None), getattr(bnb, "Linear8bitLt", None)]
    return frozenset(kind.forward for kind in kinds if kind is not None)


def _fusable(layer: LoRALayer, adapters: list[Adapter], x: Tensor) -> bool:
    """Whether the layer is GraLoRALinear or PEFT's plain LoRA right over a known base, with nobody listening in."""
    module: Any = layer.module
    base = layer.base
    if not base.fusable(x):
        return False
    if hasattr(module, "add_update"):
        return True
    if not layer.is_peft or not adapters or type(module).forward not in _peft_linear_forwards():
        return False
    if module.base_layer is not base.module:  # but another adapter's layer
        return False
    for adapter in adapters:
        name = adapter.name
        if name in module.lora_variant or module.lora_bias[name] or adapter.A.dtype != adapters[0].A.dtype:
            return False
        factors = (module.lora_A[name], module.lora_B[name])
        if any(type(part) is not nn.Linear or hooked(part) for part in factors) or hooked(module.lora_dropout[name]):
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
