"""The one mechanism that perturbs adapted layers while they are trained, and in no other pass.

A perturbed layer computes ``x·(W' + ε)ᵀ`` and its exact gradients; no weight is ever written to. One `Hook` stands in
for the layer's `forward` on the instance and adds what the attached sources give it: fused with the layer's own
products where the layer is plain LoRA over a known base, and beside the layer's own `forward` in every other case.

Which passes train. A layer is perturbed in a forward pass if it is in train mode, an adapter that the optimizer trains
is among those that it adds, and the pass records gradients. Recomputation of activations blurs the last point: in its
first pass, a reentrant checkpoint runs a layer without gradients that it will run again with them. It does so inside
the `forward(ctx, ...)` of an autograd function whose `ctx` has edges into the graph, which that of a checkpoint under
`torch.no_grad()` has not. (Code of a checkpointed region that itself switches gradients off can't be told apart from
it there; such layers are perturbed in the first pass.)

Compiled. `torch.compile` traces the hook like any forward, into plain operations in place of this library's autograd
functions; whether a layer is perturbed is a matter of its mode and its adapters, on which the graph has guards. What
changes from step to step is asked for by operators when the graph runs, and so is, in a graph that records no
gradients, whether a checkpoint runs it. torch.func's transforms take the same path.
"""

from __future__ import annotations

import functools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from . import checks
from .kernels import operators
from .kernels.blocks import How, add_blocks
from .kernels.draw import Draw, draw_gaussian, draw_low_rank
from .kernels.low_rank import Added, Plan, added, autocasts, cast, compute_dtype
from .kernels.operators import Noise, Site, traced
from .layers.adapter import Adapter, stored_blocks
from .layers.base import BaseWeight, wide
from .layers.bnb import hold_training_layout
from .layers.view import LoRALayer, fusable

__all__ = ["Attachment", "Companions", "Source", "attachments", "remove_perturbation", "trains"]


class Source:
    """What decides the ε of layers.

    Attributes:
        layers: those that it perturbs, by name.
        always: perturb in eval mode, in passes without gradients and under merged adapters too: for measuring.
        no_grad: perturb passes in train mode that record no gradients too.
        frozen: perturb beside adapters that require no gradient at present: someone runs a pass again as it was.
        fixed: what layers get, by name, instead of what `draw` gives them; None for `draw`'s.
    """

    layers: dict[str, LoRALayer]
    always = False
    no_grad = False
    frozen = False
    fixed: dict[str, Draw | Adapter | None] | None = None

    def form(self, layer: LoRALayer) -> Literal["gaussian"] | tuple[tuple[int, ...], tuple[int, ...]] | None:
        """What a graph that runs at many steps may count on: Gaussian noise, or the shapes of an ε's factors B and A.

        None where `draw` can be traced instead: it gives the same parameters at every step.
        """
        return None

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Draw | Adapter | None:
        """The ε for this forward of `layer`, drawn or as an adapter; None for none. The same for a whole step.

        An adapter whose factors require gradients gets them. One made of a grid of blocks must not require any.
        `adapters`: what ``layer.adapters()`` has just returned, where the caller has asked.
        """
        raise NotImplementedError

    def given(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Draw | Adapter | None:
        """The ε that `layer` gets at present where it is perturbed."""
        return self.draw(layer, adapters) if self.fixed is None else self.fixed.get(layer.name)


class Attachment:
    """The layers that a source perturbs, from now until `remove` or until nobody holds the attachment any more.

    Whoever perturbs a model owns its attachment, and layers have no more than a weak reference to it: a perturbation
    lives as long as its optimizer. A copy of an attachment is None, so that no copy of a model is perturbed.

    Attributes:
        source: what decides the ε.
        layers: those that are perturbed; none once it is removed.
        used: whether a step has been taken with it.
        superseded: whether another optimizer took its layers over.
    """

    def __init__(self, model: nn.Module, source: Source):
        self.source = source
        self.used = self.superseded = False
        self.layers: list[LoRALayer] = []
        self._hooks: list[Hook] = []
        self._layout = hold_training_layout(model)
        for layer in source.layers.values():
            self.add(layer)

    def add(self, layer: LoRALayer) -> None:
        hook = layer.module.__dict__.get("forward")
        if not isinstance(hook, Hook):
            hook = Hook(layer.module)
        ref = weakref.ref(self, hook.leave_out)
        hook.entries.append((ref, layer, Site(functools.partial(_asked, ref, layer))))
        self._hooks.append(hook)
        self.layers.append(layer)

    def remove(self) -> None:
        """Takes the source off all layers. Idempotent."""
        for hook in self._hooks:
            hook.leave_out(self)
        self._hooks, self.layers = [], []
        self._layout.release()

    def __reduce__(self) -> Any:
        return type(None), ()


class Hook:
    """Stands in for a module's `forward` while anything is attached to it."""

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.entries: list[tuple[weakref.ref[Attachment], LoRALayer, Site]] = []
        forward = module.__dict__.get("forward")
        # Another library's patch; or, in a copy of a perturbed model, the class's own, which is none.
        self.patch = None if forward == MethodType(type(module).forward, module) else forward
        module.forward = self
        module._replicate_for_data_parallel = _NoReplica(module)  # type: ignore[method-assign]

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.patch is not None:
            return self.patch(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        extras: list[Draw | Noise | Adapter] = []
        adapters: list[Adapter] | None = None
        for ref, layer, site in self.entries:
            if (attachment := ref()) is None or not (layer.module.training or attachment.source.always):
                continue
            adapters = layer.adapters() if adapters is None else adapters
            source = attachment.source
            if perturbs(source, layer, adapters):
                extra = _traced(source, layer, site) if traced() else source.given(layer, adapters)
                extras += [] if extra is None else [extra]
        if not extras or adapters is None:
            return self.original(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        base = layer.base
        if self.patch is None and len(args) + len(kwargs) == 1 and fusable(layer, base, adapters, x):
            return _fused(layer, base, x, adapters, extras)
        out = self.original(*args, **kwargs)
        dtype = compute_dtype(x, out.dtype)
        out = _plus_noise(out, base, x, extras, dtype)
        return _add(base, out, x, extras, _noisy(base, extras, dtype, alone=True))

    def leave_out(self, gone: Attachment | weakref.ref[Attachment]) -> None:
        """Does without an attachment from now on, and leaves the module alone where it was the last."""
        self.entries = [entry for entry in self.entries if entry[0] is not gone and entry[0]() is not gone]
        self.go_if_idle()

    def go_if_idle(self) -> None:
        # Under another library's patch it stays in line, as the layer's own forward.
        if not self.entries and self.module.__dict__.get("forward") is self:
            del self.module.forward
            self.module.__dict__.pop("_replicate_for_data_parallel", None)
            if self.patch is not None:
                self.module.forward = self.patch

    def __reduce__(self) -> Any:
        # In a copy or a file the forward of the module's class stands in its place: loading it needs no flatlora.
        if self.patch is not None:
            return operator.getitem, ((self.patch,), 0)
        return getattr, (self.module, "forward")


class _NoReplica:
    """What `nn.DataParallel` is given instead of a replica, which would compute with the original's tensors."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self) -> nn.Module:
        raise RuntimeError(
            "nn.DataParallel can't replicate a layer that is perturbed: its replicas would compute with the first "
            "device's weights. Use DistributedDataParallel (torchrun, accelerate launch), or show the process one GPU"
        )

    def __reduce__(self) -> Any:
        return getattr, (self.module, "_replicate_for_data_parallel")


class Companions(nn.ModuleList):
    """Modules that a perturbation keeps in the model it is on. Called, it does nothing, as in an `nn.Sequential`."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def attachments(module: nn.Module) -> list[tuple[Attachment, LoRALayer]]:
    """What is attached to a module at present, with the layer as each sees it."""
    hook = module.__dict__.get("forward")
    entries = hook.entries if isinstance(hook, Hook) else []
    return [(attachment, layer) for ref, layer, _ in entries if (attachment := ref()) is not None]


def remove_perturbation(model: nn.Module) -> None:
    """Takes everything that perturbs `model` off it, auxiliaries included. Idempotent.

    Optimizers that did so go on as their base optimizers.
    """
    for module in list(checks.module(model).modules()):
        for attachment, _ in attachments(module):
            attachment.remove()
        if isinstance(hook := module.__dict__.get("forward"), Hook):
            hook.go_if_idle()
        for name, child in list(module.named_children()):
            if isinstance(child, Companions):
                delattr(module, name)


# --- which passes are perturbed -------------------------------------------------------------------------------------


def perturbs(source: Source, layer: LoRALayer, adapters: Iterable[Adapter]) -> bool:
    """Whether `source` acts on a layer that adds `adapters` at present, in a pass that begins now."""
    if source.always:
        return layer.active
    if not trains(source, layer, adapters):
        return False
    if torch.is_grad_enabled() or source.no_grad or torch.compiler.is_compiling():  # a graph asks whenever it runs
        return True
    return _runs_again_with_gradients()


def trains(source: Source, layer: LoRALayer, adapters: Iterable[Adapter]) -> bool:
    """Whether passes that record gradients would be perturbed."""
    if not layer.module.training:
        return False
    seen = [adapter for adapter in adapters if adapter.name in layer.names]
    return bool(seen) if source.frozen else any(adapter.trained for adapter in seen)


def _runs_again_with_gradients() -> bool:
    """Whether a pass without gradients is the first of a checkpoint that records them; see the top of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Looked at before the frame's variables, which Python copies for whoever reads them.
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals["ctx"]
            if isinstance(ctx, FunctionCtx) and ctx.next_functions:  # type: ignore[attr-defined]
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


# --- what a graph is told -------------------------------------------------------------------------------------------


def _traced(source: Source, layer: LoRALayer, site: Site) -> Draw | Noise | Adapter | None:
    """`source.given` for a graph that runs at many steps."""
    unrecorded = not (torch.is_grad_enabled() or source.no_grad or source.always)
    form, like = source.form(layer), layer.all_adapters()[0].A
    if form is None:
        extra = source.given(layer)
        if not (unrecorded and isinstance(extra, Adapter)):
            return extra
        form, like = (extra.B.shape, extra.A.shape), extra.A
    if form == "gaussian":
        return Noise(*operators.row_noise(site.number, unrecorded, layer.shape[0], like.device, wide(like.device)))
    B, A = operators.low_rank_factors(site.number, unrecorded, *form, like.device, like.dtype)
    return Adapter("", A, B, 1.0)


def _asked(ref: weakref.ref[Attachment], layer: LoRALayer, unrecorded: bool) -> Draw | tuple[Tensor, Tensor] | None:
    """What a graph that runs now is told by its `Site`."""
    if (attachment := ref()) is None or (unrecorded and not _runs_again_with_gradients()):
        return None
    extra = attachment.source.given(layer)
    return (extra.B * extra.scaling, extra.A) if isinstance(extra, Adapter) else extra


# --- how ------------------------------------------------------------------------------------------------------------


def _fused(
    layer: LoRALayer, base: BaseWeight, x: Tensor, adapters: list[Adapter], extras: list[Draw | Noise | Adapter]
) -> Tensor:
    """The output of a layer that `fusable` admits, its base's product and all low-rank terms in one function."""
    # `add_update` adds adapters to whatever base output; dropout acts on an adapter's own input.
    add_update = layer.module.add_update if hasattr(type(layer.module), "add_update") else None
    undropped = [] if add_update else [adapter for adapter in adapters if isinstance(adapter.dropout, nn.Identity)]
    out = _base_output(base, x, [*undropped, *extras])
    if add_update:
        return add_update(out, x, True)
    if len(undropped) < len(adapters):
        # Dropout draws from the global stream: cast before it as PEFT does, so that it draws the same.
        if base.kind == "float" or not autocasts(x):
            x = x.to(adapters[0].A.dtype)
        for adapter in adapters:
            if adapter.dropout is not None and not isinstance(adapter.dropout, nn.Identity):
                out = _add(base, out, adapter.dropout(x), [adapter], in_place=True)
    return out


def _base_output(base: BaseWeight, x: Tensor, terms: list[Draw | Noise | Adapter]) -> Tensor:
    """The base layer's output and `terms`."""
    weight = base.float_weight() if base.kind == "float" else None
    like = weight.dtype if weight is not None else getattr(base.module, "compute_dtype", None) or x.dtype
    dtype = compute_dtype(x, like)
    bias = getattr(base.module, "bias", None)
    if traced():
        if weight is None or not any(isinstance(term, Noise) for term in terms):
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
    base: BaseWeight, terms: Iterable[Draw | Noise | Adapter], dtype: torch.dtype, alone: bool = False
) -> Callable[[Tensor | None], Tensor] | None:
    """What makes W0 + ε, or ε `alone`, from the stored weight or, without one, from the quantised; None without ε."""
    draws = [term for term in terms if isinstance(term, Draw) and term.kind == "gaussian"]

    def make(weight: Tensor | None) -> Tensor:
        if weight is None and not alone:
            weight = base.dense(dtype)
        for draw in draws:
            weight = draw_gaussian(draw, base.shape[1], weight, dtype)
        assert weight is not None
        return weight

    return make if draws else None


def _plus_noise(
    out: Any, base: BaseWeight, x: Tensor, terms: Iterable[Any], dtype: torch.dtype, weight: Tensor | None = None
) -> Any:
    """``out + x·(weight + Σ ε)ᵀ`` over the noises of a graph, in `dtype`; each part may be missing."""
    for noise in [term for term in terms if isinstance(term, Noise)]:
        noised = weight, noise.std, noise.seed, base.shape[1]
        if not operators.transformed():
            product = operators.noisy_product(x.to(dtype), *noised, False)
        else:
            product = x.to(dtype) @ operators.noisy_weight(*noised, dtype).t()
        out, weight = product if out is None else out + product.to(out.dtype), None
    return out


def _add(
    base: BaseWeight,
    out: Tensor | None,
    x: Tensor,
    terms: Iterable[Draw | Noise | Adapter],
    make_weight: Callable[[Any], Tensor] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`Added` of the low-rank ones among `terms`, and of grids of blocks; `make_weight` makes W out of the others."""
    adapters = [term for term in terms if isinstance(term, Adapter)]
    learned = [adapter for adapter in adapters if _learns(adapter)]
    like = learned[0].A if learned else x if out is None else out
    dtype = compute_dtype(x, like.dtype)
    draws = [term for term in terms if isinstance(term, Draw) and term.kind == "low_rank"]
    given = [adapter for adapter in adapters if adapter.A.dim() == 2 and not _learns(adapter)]
    factors = [factor for adapter in learned for factor in (adapter.A, adapter.B)]
    if out is None or make_weight or factors or draws or given:
        scalings = *(a.scaling for a in learned), *(1.0 for _ in draws), *(a.scaling for a in given)
        constant = (
            *(draw_low_rank(draw, base.shape[1], dtype) for draw in draws),
            *((cast(adapter.B, dtype), cast(adapter.A, dtype)) for adapter in given),
        )
        fading = tuple(adapter.fading for adapter in learned)
        plan = Plan(dtype, scalings, constant, fading, make_weight, in_place)
        out = (added if traced() else Added.apply)(plan, out, x, weight, bias, *factors)
    for block in (adapter for adapter in adapters if adapter.A.dim() == 4):
        out = add_blocks(How(block.scaling, dtype), x, *stored_blocks(block.A, block.B), out)
    return out


def _learns(adapter: Adapter) -> bool:
    return adapter.A.requires_grad or adapter.B.requires_grad
