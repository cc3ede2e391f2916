"""Notices what bypasses a method, before a step is taken without it.

That is: passes that compute with the adapters and never call their layers, steps of the base optimizer that the wrapper
did not start, and parameters that came or went by hand. Each would train as if there were no method.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..layers.view import LoRALayer, lora_layers
from ..ranks import world_size
from ..wrapper import only_initialises, wrappers_of
from .attachment import Attachment, forget_replaced

logger = logging.getLogger("flatlora")

_EVERY = 32  # steps after which the adapters are compared again with what the optimizer holds


class Watch:
    """Checks that steps and passes go through one attachment of an optimizer's source."""

    def __init__(self, kind: str, model: nn.Module, optimizer: Optimizer, attachment: Attachment, all_trained: bool):
        self.kind, self.model, self.optimizer, self.attachment = kind, model, optimizer, attachment
        self.stepping = False  # whether the wrapper's own step is running
        self.checked = False  # whether `check_passes` has been called in it
        self._steps = 0
        self._warned: set[str] = set()
        self._acted: set[str] = set()  # layers that any pass has gone through
        self._left: dict[str, Any] = {}  # weak references to gradients of layers without a pass in the last step
        self.note_groups(all_trained)
        self.known = self.seen  # identities of the parameters that the user gave to the optimizer
        for base in _bases(optimizer):
            if getattr(type(base).step, "hooked", False):  # else it knows no step hooks
                refuse = functools.partial(_refuse_step, weakref.ref(self), weakref.ref(base))
                base.register_step_pre_hook(refuse)

    def warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", message)

    def note_groups(self, all_trained: bool) -> None:
        """Notes the parameters in the groups and, if `all_trained` adapters are to be perturbed, those that are not."""
        self.seen = held_ids(True, self.optimizer)
        # Gradients that are there already are of earlier passes.
        self._excused = any(_gradients(layer) for layer in self.attachment.layers)
        self._frozen: list[tuple[str, nn.Parameter]] = list(self._left_out()) if all_trained else []

    def _left_out(self) -> Iterator[tuple[str, nn.Parameter]]:
        seen = {(layer.name, name) for layer in self.attachment.layers for name in layer.names}
        for layer in lora_layers(self.model):
            for adapter in layer.all_adapters():
                factor = adapter.A_param
                if (layer.name, adapter.name) not in seen and factor is not None and id(factor) in self.seen:
                    yield adapter.name, factor

    def found_new_parameters(self) -> bool:
        """Whether parameters of the model have come into the groups, in whatever way, since this was asked last."""
        held = held_ids(True, self.optimizer)
        new, self.seen = held - self.seen, held
        return bool(new) and not new.isdisjoint(map(id, self.model.parameters()))

    def holds_foreign_tensors(self) -> bool:
        """Whether the groups hold copies that others train, neither given by the user nor parameters of the model."""
        ours = {id(p) for p in self.model.parameters()}
        return not held_ids(True, self.optimizer) <= self.known | ours

    def check_parameters(self) -> None:
        """Warns of adapters that are trained unperturbed, or perturbed and trained by nobody."""
        if trained := {name for name, p in self._frozen if p.grad is not None}:
            self.warn_once(
                "frozen",
                f"adapters {sorted(trained)} are trained but not perturbed: they were frozen, or not there, when the "
                f"{self.kind} was built. Build it again, or name them as adapter=...",
            )
        self._steps += 1
        if self._steps % _EVERY != 1 or self.holds_foreign_tensors():
            return
        held, layers = held_ids(True, self.optimizer), self.attachment.layers
        if new := [one.name for one in layers if any(p.requires_grad and id(p) not in held for p in _factors(one))]:
            self.warn_once(
                "replaced",
                f"adapters of {len(new)} layers (first: {new[0]!r}) hold parameters that the {self.kind} does not, so "
                "nobody trains them: they were replaced after it was built, as by initialize_lora_eva_weights or by "
                "deleting and adding an adapter, or were left out of its groups. Build the optimizer again",
            )

    def check_passes(self) -> None:
        """Warns of gradients that did not come through the layers; RuntimeError in the first step, if none did."""
        self.checked = True
        if self._excused:
            self._excused = False
            return
        source, layers = self.attachment.source, self.attachment.layers
        self._acted |= source.passes.keys()
        unused = [layer for layer in layers if not source.acts_on(layer)]
        none_used = len(unused) == len(layers)
        if not none_used:  # a layer may well be out of use for a step, as an expert is
            new = self._new_gradients(unused)
            unused = [layer for layer in unused if layer.name not in self._acted or layer.name in new]
            unused = [layer for layer in unused if not _used_elsewhere(layer, source)]
        if not unused:
            return
        if missing := [layer.name for layer in unused if not layer.all_adapters()]:
            self.warn_once(
                "gone",
                f"the adapters that the {self.kind} perturbs are no longer in {len(missing)} layers (first: "
                f"{missing[0]!r}); build it again over those that took their place",
            )
        if not any(layer.module.training for layer in unused):
            how = f"all {len(unused)} adapted" if none_used else f"{len(unused)} adapted"
            if none_used or any(_gradients(layer) for layer in unused):
                self.warn_once(
                    "mode",
                    f"{self.kind}.step() found {how} layers in eval mode, in which none is perturbed; call "
                    "model.train() before the passes that train",
                )
            return
        if bypassed := [layer for layer in unused if _gradients(layer)]:
            for layer in bypassed:
                forget_replaced(layer.module)
            self._refuse_or_warn_of([layer.name for layer in bypassed], refuse=none_used and self._steps == 1)

    def _new_gradients(self, unused: list[LoRALayer]) -> set[str]:
        """The layers without a pass in this step and the last whose gradient is a new one."""
        grads = {layer.name: next(iter(_grads(layer)), None) for layer in unused}
        former, self._left = self._left, {name: weakref.ref(grad) for name, grad in grads.items() if grad is not None}
        return {name for name in former.keys() & self._left.keys() if former[name]() is not grads[name]}

    def _refuse_or_warn_of(self, bypassed: list[str], refuse: bool) -> None:
        message = (
            f"{self.kind}.step(): the adapters of {len(bypassed)} layers (first: {bypassed[0]!r}) have gradients, and "
            "no pass that trains has gone through these layers' forward: something computes with their weights and "
            "never calls them, so they were not perturbed, or it ran before this optimizer was built. Fused kernels do "
            "so, and terms of a loss on the weights themselves. For axolotl set lora_mlp_kernel, lora_qkv_kernel and "
            "lora_o_kernel to false; for Unsloth give its get_peft_model bias='lora_only', or "
            "lora_dropout > 0 with UNSLOTH_FUSED_LORA_DROPOUT=0 in the environment (read in its source, not run); code "
            "of your own has to call the layers. Gradients that were set by hand: call optimizer.remove() to go on "
            "without the method"
        )
        if refuse:
            raise RuntimeError(message)
        self.warn_once("passes", message)


def held_ids(adapter: Any, optimizer: Optimizer) -> set[int]:
    """Identities of the parameters in the groups: all, or, without an `adapter`, those that require a gradient."""
    return {id(p) for group in optimizer.param_groups for p in group["params"] if adapter or p.requires_grad}


def _factors(layer: LoRALayer) -> list[nn.Parameter]:
    """The factors of the layer's adapters that have gradients, though they may be frozen by now."""
    return [p for adapter in layer.all_adapters() for p in adapter.params if p.grad is not None]


def _grads(layer: LoRALayer) -> list[Any]:
    return [p.grad for p in _factors(layer)]


def _gradients(layer: LoRALayer) -> bool:
    """Whether a factor has a gradient that is not zero. Waits for the device, but only where something is wrong."""
    local = [getattr(grad, "_local_tensor", grad) for grad in _grads(layer)]
    return any(bool(grad.any()) for grad in local if not grad.is_meta)


def _used_elsewhere(layer: LoRALayer, source: Any) -> bool:
    """Whether another process may have used the layer, such as an expert's: if layers of its name are used here.

    Fused kernels leave out all layers of one name.
    """
    end = layer.name.rpartition(".")[2]
    return world_size() > 1 and any(name.rpartition(".")[2] == end for name in source.passes)


def _bases(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer beneath all wrappers, and those that it keeps itself, as Lookahead and SAM do."""
    inner = list(wrappers_of(optimizer))
    found = [inner[-1].base_optimizer if inner else optimizer]
    for base in found:
        kept = [value for value in vars(base).values() if isinstance(value, Optimizer)]
        found += [value for value in kept if all(value is not other for other in found)]
    return found


def _refuse_step(watched: weakref.ref[Watch], base: weakref.ref[Optimizer], stepped: Optimizer, *_: Any) -> None:
    """A step hook on the base: RuntimeError where the wrapper around it did not start the step."""
    watch = watched()
    if watch is None or watch.stepping or not watch.attachment.layers or stepped is not base():
        return
    if only_initialises(stepped):  # as torch.distributed.checkpoint asks of it
        return
    raise RuntimeError(
        f"{type(stepped).__name__}.step() was called, which goes past the {watch.kind} around it: step that one, or "
        f"give it to whatever steps (scaler.step, a scheduler, a trainer). optimizer.remove() takes the {watch.kind} "
        "off the model"
    )
