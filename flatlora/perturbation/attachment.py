"""How a source is put on layers, and taken off again.

`PerturbedForward` stands in for a layer's `forward` on the instance. It finds which of the attached sources perturb
this pass (`passes.py`), and adds their ε to the layer's product (`products.py`). No weight is ever written to.

`torch.compile` traces it like any forward, into plain operations in place of this library's autograd functions. Whether
a layer is perturbed depends on its mode and its adapters, which the graph guards. What changes from step to step comes
from operators when the graph runs; in a graph that records no gradients, so does whether a checkpoint runs it.
torch.func's transforms take the same path.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import weakref
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..kernels import operators
from ..kernels.draw import Draw, refuse_capture
from ..kernels.operators import GraphNoise, LayerHandle, in_functorch, is_tracing
from ..layers.adapter import Adapter
from ..layers.base import sum_dtype
from ..layers.bnb import hold_training_layout
from ..layers.view import LoRALayer, fusable
from .passes import records_gradients, runs_again_with_gradients, would_perturb
from .products import Term, Terms, beside_output, fused_output
from .source import Source

logger = logging.getLogger("flatlora")


class Attachment:
    """The layers that a source perturbs, from now until `remove` or until nobody holds the attachment any more.

    The optimizer owns it, and layers refer to it weakly, so that a perturbation lives as long as its optimizer. A copy
    of an attachment is None, so that no copy of a model is perturbed.
    """

    def __init__(self, model: nn.Module, source: Source):
        self.source = source
        self.used = False  # whether a step has been taken with it
        self.superseded = False  # whether another optimizer took its layers over
        self.layers: list[LoRALayer] = []  # those that are perturbed; none once it is removed
        self._forwards: list[PerturbedForward] = []
        self._layout = hold_training_layout(model)
        for layer in source.layers.values():
            self.add(layer)

    def add(self, layer: LoRALayer) -> None:
        forward = _perturbed_forward(layer.module) or PerturbedForward(layer.module)
        forward.entries.append(_AttachedLayer(weakref.ref(self, forward.leave_out), layer))
        self._forwards.append(forward)
        self.layers.append(layer)

    def drop(self, layer: LoRALayer) -> None:
        if (forward := _perturbed_forward(layer.module)) in self._forwards:
            forward.leave_out(self)
            self._forwards.remove(forward)
            self.layers.remove(layer)

    def remove(self) -> None:
        """Takes the source off all layers. Idempotent."""
        for forward in self._forwards:
            forward.leave_out(self)
        self._forwards, self.layers = [], []
        self._layout.release()

    def __reduce__(self) -> Any:
        return type(None), ()


class _AttachedLayer(LayerHandle):
    """A layer with the attachment that it is of."""

    def __init__(self, attachment: weakref.ref[Attachment], layer: LoRALayer):
        super().__init__()
        self.attachment, self.layer = attachment, layer

    def perturbation(self, unrecorded: bool) -> Draw | tuple[Tensor, Tensor] | None:
        if (attachment := self.attachment()) is None or (unrecorded and not runs_again_with_gradients()):
            return None
        source, adapters = attachment.source, self.layer.adapters()
        source.note_pass(self.layer, adapters)
        extra = source.given(self.layer, adapters)
        return (extra.B * extra.scaling, extra.A) if isinstance(extra, Adapter) else extra

    def measures(self) -> bool:
        return (attachment := self.attachment()) is not None and attachment.source.measures(self.layer)

    def record(self, part: Tensor) -> None:
        if (attachment := self.attachment()) is not None:
            attachment.source.rise.record(self.layer.name, part)


class PerturbedForward:
    """Stands in for a module's `forward` while anything is attached to it."""

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self.entries: list[_AttachedLayer] = []
        forward = module.__dict__.get("forward")
        # Another library's patch; or, in a copy of a perturbed model, the class's own, which is none.
        self.patch = None if forward == MethodType(type(module).forward, module) else forward
        self._input = next(iter(inspect.signature(self.patch or module.forward).parameters), "")
        module.forward = self
        module._replicate_for_data_parallel = _NoReplica(self)  # type: ignore[method-assign]

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.patch is not None:
            return self.patch(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        extras: list[Term] = []
        adapters: list[Adapter] | None = None
        for entry in self.entries:
            layer = entry.layer
            if (attachment := entry.attachment()) is None or not (layer.module.training or attachment.source.always):
                continue
            adapters = layer.adapters() if adapters is None else adapters
            source = attachment.source
            if would_perturb(source, layer, adapters):
                tracing = is_tracing()
                extra = _in_graph(source, entry) if tracing else _in_pass(source, layer, adapters)
                recorded = torch.is_grad_enabled() and (not in_functorch() if tracing else source.measures(layer))
                extras += [] if extra is None else [(extra, entry if recorded else None)]
        if not extras or adapters is None or not (args or kwargs):
            return self.original(*args, **kwargs)
        x = args[0] if args else kwargs.get(self._input, next(iter(kwargs.values())))
        refuse_capture(x.device)
        if len(args) + len(kwargs) > 1 and not layer.is_peft and not is_tracing():
            _warn_of_arguments(layer.name)
        base = layer.base
        if self.patch is None and len(args) + len(kwargs) == 1 and fusable(layer, base, adapters, x):
            return fused_output(layer, base, x, adapters, extras)
        return beside_output(base, self.original(*args, **kwargs), x, Terms(extras))

    def leave_out(self, gone: Attachment | weakref.ref[Attachment]) -> None:
        """Drops an attachment, and restores the module's forward if it was the last."""
        self.entries = [one for one in self.entries if one.attachment is not gone and one.attachment() is not gone]
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
    """What `nn.DataParallel` is given instead of a replica, which would compute with the original's tensors.

    It is also where the module's `PerturbedForward` is found when others have patched `forward` since.
    """

    def __init__(self, forward: PerturbedForward):
        self.forward = forward

    def __call__(self) -> nn.Module:
        raise RuntimeError(
            "nn.DataParallel can't replicate a layer that is perturbed: its replicas would compute with the first "
            "device's weights. Use DistributedDataParallel (torchrun, accelerate launch), or show the process one GPU"
        )

    def __reduce__(self) -> Any:
        return getattr, (self.forward.module, "_replicate_for_data_parallel")


class AttachedModules(nn.ModuleList):
    """Modules that a perturbation keeps in the model. It returns its input, as an `nn.Sequential` may call it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def remove_attached_modules(module: nn.Module) -> None:
    """Takes the `AttachedModules` out of a module."""
    for name, child in list(module.named_children()):
        if isinstance(child, AttachedModules):
            delattr(module, name)


def _perturbed_forward(module: nn.Module) -> PerturbedForward | None:
    """What stands in for the module's forward, also beneath patches that came later."""
    found = module.__dict__.get("_replicate_for_data_parallel")
    return found.forward if isinstance(found, _NoReplica) else None


def forget_replaced(module: nn.Module) -> None:
    """Has the next attachment replace the forward that others put in the place of ours."""
    if (forward := _perturbed_forward(module)) is not None and module.__dict__.get("forward") is not forward:
        del module.__dict__["_replicate_for_data_parallel"]


def attachments(module: nn.Module) -> list[tuple[Attachment, LoRALayer]]:
    """What is attached to a module at present, with the layer as each sees it."""
    entries = [] if (forward := _perturbed_forward(module)) is None else forward.entries
    return [(attachment, one.layer) for one in entries if (attachment := one.attachment()) is not None]


def remove_perturbation(model: nn.Module) -> None:
    """Takes everything that perturbs `model` off it, auxiliaries included. Idempotent.

    Optimizers that did so go on as their base optimizers.
    """
    for module in list(checks.module(model).modules()):
        for attachment, _ in attachments(module):
            attachment.remove()
        if (forward := _perturbed_forward(module)) is not None:
            forward.go_if_idle()
        remove_attached_modules(module)


def _in_pass(source: Source, layer: LoRALayer, adapters: list[Adapter]) -> Draw | Adapter | None:
    if not records_gradients(source):
        source.skipped.add(layer.name)
        return None
    if torch.is_grad_enabled():
        source.note_pass(layer, adapters)
    extra = source.given(layer, adapters)
    if layer.name in source.skipped and extra is not None and not source.always:
        source.skipped.clear()
        _warn_of_two_passes(source)
    return extra


@functools.cache
def _warn_of_arguments(layer: str) -> None:
    logger.warning(
        "layer %r is called with more than its input. It is perturbed as it computes without: if the rest scales, "
        "masks or switches its update, keep that in a module around it, or in its attributes `scaling` and `enabled`",
        layer,
    )


def _warn_of_two_passes(source: Source) -> None:
    if not source.warned_of_two_passes:
        source.warned_of_two_passes = True
        logger.warning(
            "passes in train mode came first without gradients, which are not perturbed, and now with them, which are. "
            "That is right for old log-probabilities and the like. Where both make up one loss (GradCache, Cached... "
            "losses), gradients are wrong: build the optimizer with perturb_no_grad=True"
        )


def _in_graph(source: Source, entry: _AttachedLayer) -> Draw | GraphNoise | Adapter | None:
    """`source.given` for a graph that runs at many steps."""
    layer, number = entry.layer, entry.number
    unrecorded = not (torch.is_grad_enabled() or source.no_grad or source.always)
    kind, like = source.graph_kind(layer), layer.all_adapters()[0].A
    if kind is None:
        extra = source.given(layer)
        if not (unrecorded and isinstance(extra, Adapter)):
            return extra
        kind, like = (extra.B.shape, extra.A.shape), extra.A
    if kind == "gaussian":
        return GraphNoise(*operators.row_noise(number, unrecorded, layer.shape[0], like.device, sum_dtype(like.device)))
    B, A = operators.low_rank_factors(number, unrecorded, *kind, like.device, like.dtype)
    return Adapter("", A, B, 1.0)
