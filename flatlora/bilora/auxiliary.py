"""The auxiliary adapters of Bi-LoRA: putting them beside a model's adapters, and taking them off again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.adapter import Adapter
from ..layers.base import full_tensor
from ..layers.stack import chunks
from ..layers.tangent import product_sq
from ..layers.view import LoRALayer, lora_layers, plain_name, seen_through
from ..perturbation.attachment import AttachedModules, Attachment, attachments, remove_attached_modules
from ..perturbation.source import Source
from ..streams import shared_seed

Triple = tuple[Tensor, Tensor, float]  # A (r, n), B (m, r) and the scaling of their product

# An auxiliary is registered in its layer, where FSDP2 shards and gathers it with the layer's adapters. Its name begins
# like those of the adapters: PEFT does not freeze such parameters, and loops over `named_parameters` that send merged
# weights elsewhere, as TRL's to vLLM, leave them out.
NAME = "lora_ascent_branches"
NAME_IN_GRALORA = "gralora_ascent_branches"

# The auxiliary's gradients are multiplied by this until the optimizer steps. The norm of all gradients, and clipping by
# it, is then the primary's up to a part in 10^12. A power of two, so that dividing by it restores every bit.
GRAD_SCALE = 2.0**-20


class Auxiliary(nn.Module):
    """The adapter that ascends: ``A`` (r, n) Kaiming-uniform, ``B`` (m, r) zero, ``scaling`` = alpha / r.

    It is left out of the model's `state_dict`, and is in the optimizer's.
    """

    attachment: Attachment | None = None  # what applies it, with all others, until an optimizer takes it over

    def __init__(self, layer: LoRALayer, r: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.layer = layer  # that it is registered in
        m, n = layer.shape
        like = layer.all_adapters()[0].A
        a = torch.empty(r, n, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(like.device, like.dtype))
        self.B = nn.Parameter(torch.zeros(m, r, device=like.device, dtype=like.dtype))
        self.scaling = alpha / r

    def _save_to_state_dict(self, *args: Any) -> None: ...

    def _load_from_state_dict(self, *args: Any) -> None: ...


def auxiliaries_of(model: nn.Module) -> list[Auxiliary]:
    """The auxiliaries on a model."""
    return [module for module in model.modules() if isinstance(module, Auxiliary)]


class AuxiliarySource(Source):
    """Gives each layer its auxiliary; `scale_grads`: with gradients times `GRAD_SCALE`, which an optimizer undoes."""

    def __init__(self, auxiliaries: Iterable[Auxiliary], scale_grads: bool = False):
        self.auxiliaries = {auxiliary.layer.name: auxiliary for auxiliary in auxiliaries}
        super().__init__(auxiliary.layer for auxiliary in self.auxiliaries.values())
        self.scale_grads = scale_grads and all(one.A.dtype != torch.float16 for one in self.auxiliaries.values())
        self.grad_scale = GRAD_SCALE if self.scale_grads else 1.0  # of the last forward pass

    def draw(self, layer: LoRALayer, adapters: list[Adapter] | None = None) -> Adapter:
        auxiliary = self.auxiliaries[layer.name]
        if not (self.replaying or auxiliary.A.requires_grad):  # PEFT freezes it when it adds another adapter
            auxiliary.requires_grad_(True)
        # In float16, which FSDP may cast to, scaled gradients would vanish.
        factor = GRAD_SCALE if self.scale_grads and auxiliary.A.dtype != torch.float16 else 1.0
        if self.grad_scale != factor:  # so that a traced pass writes nothing
            self.grad_scale = factor
        return Adapter("", auxiliary.A, auxiliary.B, auxiliary.scaling, grad_scale=self.grad_scale)

    def acts_on(self, layer: LoRALayer) -> bool:
        if super().acts_on(layer):
            return True
        # The passes of a graph are not noted, but leave gradients. On a CPU, where the host need not wait, zeros (of
        # zero_grad(set_to_none=False)) do not count.
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

    In train mode a layer then computes ``x·(W0 + s1·B1·A1 + s2·B2·A2)ᵀ``. In eval mode, in what PEFT saves and in
    merged weights the auxiliary has no part. Its parameters are registered in the layers, under names that begin with
    PEFT's ``lora_``, so `.to()`, DDP and FSDP2 see them. The model's `state_dict()` leaves them out; the optimizer's
    has them.

    Before this call collect the primary's parameters, and call PEFT's `print_trainable_parameters`, which counts the
    auxiliary from then on. After it wrap the model by DDP or FSDP2, and make copies for averaging weights (Lightning's
    EMA and SWA pair parameters by position, so attach in the module's `__init__`).

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
            that DDP or FSDP2 wraps, r < 1. Nothing is attached.
    """
    r = checks.integer("r", r, 1)
    seed = shared_seed() if seed is None else checks.integer("seed", seed, -(2**63))
    alpha = 2.0 * r if alpha is None else checks.number("alpha", alpha, above=0)
    layers = lora_layers(model, adapter)
    if adapter is None:
        layers = _without_frozen(layers)
    _refuse_unfit(model, layers)
    attached = {other for layer in layers for other, _ in attachments(layer.module)}
    former = {other for other in attached if isinstance(other.source, AuxiliarySource)}
    if any(not other.used for other in former):
        raise ValueError(
            f"{type(model).__name__} has an auxiliary already; call detach_auxiliary(model) before attaching another"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    auxiliaries = [Auxiliary(layer, r, alpha, generator) for layer in layers]
    detach_auxiliary(model)  # what an earlier optimizer left
    for other in former:
        other.superseded = True
    attachment = Attachment(model, AuxiliarySource(auxiliaries))
    for auxiliary in auxiliaries:
        auxiliary.attachment = attachment
        module = auxiliary.layer.module
        module.add_module(NAME_IN_GRALORA if hasattr(module, "gralora_A") else NAME, AttachedModules([auxiliary]))
    return [p for auxiliary in auxiliaries for p in (auxiliary.A, auxiliary.B)]


def _refuse_unfit(model: nn.Module, layers: list[LoRALayer]) -> None:
    """ValueError if adapters are merged, or if DDP or FSDP2, which would not reduce new parameters, wraps the model."""
    for layer in layers:
        if merged := sorted(layer.merged):
            raise ValueError(f"layer {layer.name!r} has merged adapters {merged}; call model.unmerge_adapter() first")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("attach the auxiliary before DistributedDataParallel wraps the model, or it is never reduced")
    sharded = [layer.name for layer in layers if any(hasattr(a.A, "full_tensor") for a in layer.all_adapters())]
    if sharded:
        raise ValueError(
            f"the adapters of {len(sharded)} layers (first: {sharded[0]!r}) are sharded, and an auxiliary that comes "
            "after fully_shard is never reduced; call attach_auxiliary(model) before it, and build the optimizer after"
        )


def _without_frozen(layers: list[LoRALayer]) -> list[LoRALayer]:
    """The layers with adapters that require a gradient, which a reference policy's do not; all if none does."""
    trained = [frozenset(adapter.name for adapter in layer.all_adapters() if adapter.trained) for layer in layers]
    return [seen_through(layer, names) for layer, names in zip(layers, trained, strict=True) if names] or layers


def detach_auxiliary(model: nn.Module) -> None:
    """Removes every trace of `attach_auxiliary` from the model. Idempotent.

    An optimizer over the auxiliary goes on with the rest of its parameters.
    """
    for module in list(checks.module(model).modules()):
        for attachment, _ in attachments(module):
            if isinstance(attachment.source, AuxiliarySource):
                attachment.remove()
        if isinstance(module, Auxiliary) and module.attachment is not None:
            module.attachment.remove()
        remove_attached_modules(module)


def named_triples(model: nn.Module, triples: Sequence[Triple]) -> dict[str, Triple]:
    """A user's triples by the names of their A in the model; ValueError for another model's, or unfit shapes."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for i, triple in enumerate(triples):
        A, B, scaling = triple
        if id(A) not in names or id(B) not in names:
            raise ValueError(f"auxiliary[{i}]: A and B must be parameters of the model, which has neither or only one")
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"auxiliary[{i}]: A {tuple(A.shape)} and B {tuple(B.shape)} do not multiply; expected (r, n) and (m, r)"
            )
        found[plain_name(names[id(A)])] = (A, B, float(scaling))
    return found


def total_norm(triples: dict[str, Triple]) -> Tensor:
    """``sqrt(Σ ‖s·B·A‖_F²)``, without products larger than r×r, and with few launches: alike layers are stacked."""
    alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for A, B, scaling in triples.values():
        a, b = full_tensor(A), full_tensor(B)
        alike.setdefault((scaling, a.shape, b.shape, a.dtype, b.dtype, a.device), []).append((a, b))
    squares = []
    for (scaling, *_), group in alike.items():
        first = group[0]
        for part in chunks(group, first[0].numel() + first[1].numel(), first[0].device):
            a, b = (torch.stack(same) for same in zip(*part, strict=True))
            squares.append(scaling**2 * product_sq(b, a))
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().clamp_(min=0.0).sqrt_()


def shapes_of(layers: Any) -> dict[str, Any]:
    """The shapes of A and B of a checkpoint's layers, their scaling, and the ranks of the adapters beside them."""
    try:
        return {
            name: {"A": tuple(one["A"].shape), "B": tuple(one["B"].shape)} | {k: one[k] for k in ("scaling", "ranks")}
            for name, one in layers.items()
        }
    except (AttributeError, KeyError, TypeError) as reason:
        raise ValueError("the state_dict's Bi-LoRA part has no A, B, scaling and ranks for each layer") from reason
