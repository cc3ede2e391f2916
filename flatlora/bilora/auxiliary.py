"""The auxiliary adapters of Bi-LoRA: putting them beside a model's adapters, and taking them off again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.adapter import Adapter
from ..layers.view import LoRALayer, lora_layers
from ..perturbation.attachment import AttachedModules, Attachment, attachments
from ..perturbation.source import Source
from ..streams import shared_seed

__all__ = [
    "GRAD_SCALE",
    "Auxiliaries",
    "Auxiliary",
    "AuxiliarySource",
    "attach_auxiliary",
    "attached_auxiliaries",
    "detach_auxiliary",
    "primary_ranks",
]

# An auxiliary lies in its layer, where FSDP2 shards and gathers it with the layer's adapters. Its name begins as those
# of the layer's adapters do, since that is what loops over `named_parameters` leave out that send merged weights
# elsewhere, as TRL's do to vLLM, and what PEFT neither freezes nor takes for a part of the base.
NAME = "lora_ascent_branches"
NAME_IN_GRALORA = "gralora_ascent_branches"

# What an auxiliary's gradients are multiplied by until its optimizer steps. Whoever measures or clips the gradients of
# all parameters then sees the primary's norm, up to a part in 10^12, and yet finds the auxiliary's for DDP, GradScaler
# and FSDP to do with as with any other. A power of two: taken back, not a bit of them has changed.
GRAD_SCALE = 2.0**-20


class Auxiliary(nn.Module):
    """The adapter that ascends: ``A`` (r, n) Kaiming-uniform, ``B`` (m, r) zero, ``scaling`` = alpha / r.

    It is no part of the model's `state_dict`, which loads strictly into a model without auxiliaries and the other way
    around; the optimizer's state carries it.
    """

    def __init__(self, layer: LoRALayer, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.layer = layer
        m, n = layer.shape
        like = layer.all_adapters()[0].A
        a = torch.empty(r, n, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(like.device, like.dtype))
        self.B = nn.Parameter(torch.zeros(m, r, device=like.device, dtype=like.dtype))
        self.scaling = alpha / r

    def _save_to_state_dict(self, *args: Any) -> None: ...

    def _load_from_state_dict(self, *args: Any) -> None: ...


class Auxiliaries(AttachedModules):
    """A layer's auxiliary as it is registered in the layer's module.

    `attachment`, of all layers, is theirs until an optimizer takes it over, whose life is then the perturbation's.
    """

    attachment: Attachment | None = None


class AuxiliarySource(Source):
    """Gives each layer its auxiliary.

    Attributes:
        scale_grads: whether gradients are scaled down, for an optimizer that scales them up again.
        grad_scale: what the gradients of the last forward pass are multiplied by.
    """

    def __init__(self, auxiliaries: Iterable[Any], scale_grads: bool = False):
        self.auxiliaries: dict[str, Auxiliary] = {auxiliary.layer.name: auxiliary for auxiliary in auxiliaries}
        super().__init__(auxiliary.layer for auxiliary in self.auxiliaries.values())
        self.scale_grads = scale_grads and all(one.A.dtype != torch.float16 for one in self.auxiliaries.values())
        self.grad_scale = GRAD_SCALE if self.scale_grads else 1.0

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Adapter:
        auxiliary = self.auxiliaries[layer.name]
        if not (self.replaying or auxiliary.A.requires_grad):  # PEFT froze it, as it does when another adapter comes
            auxiliary.requires_grad_(True)
        A: Tensor = auxiliary.A
        B: Tensor = auxiliary.B
        # In float16, which FSDP may cast to, they would vanish.
        factor = GRAD_SCALE if self.scale_grads and A.dtype != torch.float16 else 1.0
        if self.grad_scale != factor:  # compilers take no writing where nothing changes
            self.grad_scale = factor
        return Adapter("", A, B, auxiliary.scaling, grad_scale=self.grad_scale)

    def acts_on(self, layer: LoRALayer) -> bool:
        if super().acts_on(layer):
            return True
        # A graph does not tell of its passes, but leaves gradients. Zeros, as of zero_grad(set_to_none=False), tell
        # nothing, and are looked for where the host need not wait for a device.
        grad: Any = self.auxiliaries[layer.name].B.grad
        grad = getattr(grad, "_local_tensor", grad)
        return grad is not None and (grad.device.type != "cpu" or bool(grad.any()))


def attach_auxiliary(
    model: nn.Module,
    r: int = 8,
    *,
    alpha: float | None = None,
    adapter: str | Iterable[str] | None = None,
    seed: int | None = None,
) -> list[nn.Parameter]:
    """Puts an auxiliary low-rank module beside the adapters of every adapted layer and returns their parameters.

    In train mode a layer then computes ``x·(W0 + s1·B1·A1 + s2·B2·A2)ᵀ``, both adapters through one pair of matmuls; in
    eval mode, in what PEFT saves and in merged weights it is as if the auxiliary were not there. The parameters are
    registered in the layers, so DDP and FSDP2 (wrap the model after this call) and `.to()` see them; the model's
    `state_dict()` leaves them out, and the optimizer's carries them. PEFT's `print_trainable_parameters` counts them
    from now on, though they are not saved: call it before. Their names have PEFT's prefix, ``lora_``, by which loops
    that send merged weights to an inference engine leave them out; collect the primary's parameters before, too. What
    averages weights pairs a copy's parameters by position, as Lightning's EMA and SWA do: attach the auxiliary before
    the copy is made, in the module's `__init__`.

    Args:
        model: a model with adapters, as `lora_layers` reads it.
        r: rank of the auxiliary.
        alpha: its scaling is ``alpha / r``; by default ``2·r``.
        adapter: name or names of the adapters whose layers get one, and beside which it is active; None for all.
        seed: for the initial ``A``; by default torch's initial seed, rank 0's when distributed.

    Returns:
        ``A`` (r, n) and ``B`` (m, r) of every layer, in the layers' order.

    Raises:
        ValueError: no adapted layer, an unknown adapter, merged adapters, an auxiliary that is there already, a model
            that DDP or FSDP2 wraps, r < 1. Nothing is attached then.
    """
    r = checks.integer("r", r, 1)
    seed = shared_seed() if seed is None else checks.integer("seed", seed, -(2**63))
    alpha = 2.0 * r if alpha is None else checks.number("alpha", alpha, above=0)
    layers = lora_layers(model, adapter)
    if adapter is None:
        layers = _without_frozen(layers)
    _refuse_unfit(model, layers)
    former = {
        other for layer in layers for other, _ in attachments(layer.module) if isinstance(other.source, AuxiliarySource)
    }
    if any(not other.used for other in former):
        raise ValueError(
            f"{type(model).__name__} has an auxiliary already; call detach_auxiliary(model) before attaching another"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    auxiliaries = [Auxiliary(layer, r, alpha, generator) for layer in layers]
    detach_auxiliary(model)  # what an optimizer that is gone, or one that has had its time, left
    for other in former:
        other.superseded = True
    attachment = Attachment(model, AuxiliarySource(auxiliaries))
    for auxiliary in auxiliaries:
        registered = Auxiliaries([auxiliary])
        registered.attachment = attachment
        module = auxiliary.layer.module
        module.add_module(NAME_IN_GRALORA if hasattr(module, "gralora_A") else NAME, registered)
    return [p for auxiliary in auxiliaries for p in (auxiliary.A, auxiliary.B)]


def _refuse_unfit(model: nn.Module, layers: list[LoRALayer]) -> None:
    """ValueError if adapters are merged, or if parameters that come now would be no part of what DDP or FSDP2 averages
    over the ranks."""
    for layer in layers:
        if layer.merged:
            raise ValueError(
                f"layer {layer.name!r} has merged adapters {sorted(layer.merged)}; unmerge them with "
                "model.unmerge_adapter() before attaching an auxiliary"
            )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("attach the auxiliary before DistributedDataParallel wraps the model, or it is never reduced")
    sharded = [layer.name for layer in layers if any(hasattr(a.A, "full_tensor") for a in layer.all_adapters())]
    if sharded:
        raise ValueError(
            f"the adapters of {len(sharded)} layers (first: {sharded[0]!r}) are sharded, and an auxiliary that comes "
            "after fully_shard is never reduced; call attach_auxiliary(model) before it, and build the optimizer after"
        )


def _without_frozen(layers: list[LoRALayer]) -> list[LoRALayer]:
    """The layers seen through adapters that require a gradient, which a reference policy's do not; all if none does."""
    found = []
    for layer in layers:
        trained = {a.name for a in layer.all_adapters() if a.A.requires_grad or a.B.requires_grad}
        if trained:
            found.append(LoRALayer(layer.name, layer.module, layer.base, frozenset(trained)))
    return found or layers


def detach_auxiliary(model: nn.Module) -> None:
    """Removes every trace of `attach_auxiliary` from the model. Idempotent.

    An optimizer over the auxiliary goes on with the rest of its parameters.
    """
    for module in list(checks.module(model).modules()):
        for attachment, _ in attachments(module):
            if isinstance(attachment.source, AuxiliarySource):
                attachment.remove()
        for name, auxiliaries in list(module.named_children()):
            if isinstance(auxiliaries, Auxiliaries):
                if auxiliaries.attachment is not None:
                    auxiliaries.attachment.remove()
                delattr(module, name)


def attached_auxiliaries(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of every auxiliary on the model, by its layer's name."""
    auxiliaries = [module for module in model.modules() if isinstance(module, Auxiliary)]
    return {auxiliary.layer.name: (auxiliary.A, auxiliary.B, auxiliary.scaling) for auxiliary in auxiliaries}


def primary_ranks(model: nn.Module) -> dict[str, dict[str, int]]:
    """The ranks of the adapters beside each auxiliary, by layer and adapter name."""
    auxiliaries = [module for module in model.modules() if isinstance(module, Auxiliary)]
    return {module.layer.name: module.layer.ranks() for module in auxiliaries}
