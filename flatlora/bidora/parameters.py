"""The two sets of parameters of PEFT's DoRA layers: found, checked, put back to their start, and how far they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks
from ..layers.adapter import Adapter
from ..layers.base import sum_dtype
from ..layers.stack import BaseNorms
from ..layers.view import LoRALayer, lora_layers, seen_through
from .passes import parameters_of


def direction_parameters(model: nn.Module, adapter: str | Iterable[str] | None = None) -> list[nn.Parameter]:
    """A (r, n) and B (m, r) of every DoRA adapter in `model`: what `BilevelOptimizer` trains on the lower level.

    A new classification head, or whatever else is to be trained, belongs to the lower level too: add its parameters.

    Args:
        model: a PEFT model whose adapters were made with ``LoraConfig(use_dora=True)``.
        adapter: name or names of the adapters; None for all.

    Raises:
        ValueError: no such adapter has a magnitude.
    """
    parts = [part for _, A, B in _dora_adapters(model, adapter) for part in (A, B)]
    return [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


def magnitude_parameters(model: nn.Module, adapter: str | Iterable[str] | None = None) -> list[nn.Parameter]:
    """The magnitude μ (m,) of every DoRA adapter in `model`: the upper level. Arguments as `direction_parameters`."""
    return [magnitude for magnitude, _, _ in _dora_adapters(model, adapter)]


@torch.no_grad()
def reset_directions(model: nn.Module, adapter: str | Iterable[str] | None, seed: int) -> None:
    """A Kaiming-uniform and B zero, as PEFT begins; for an embedding A zero and B normal. Draws from `seed` alone."""
    # On the CPU whatever the model's device and the default one, so that every machine begins alike.
    generator = torch.Generator("cpu").manual_seed(seed)
    for _, A, B in _dora_adapters(model, adapter):
        if isinstance(A, nn.Parameter):
            A.zero_()
            B.copy_(torch.randn(B.shape, generator=generator, dtype=torch.float32, device="cpu"))
            continue
        start = torch.empty(A.weight.shape, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        A.weight.copy_(start)
        for p in B.parameters():
            p.zero_()


def check_levels(lower: Optimizer, upper: Optimizer, model: nn.Module, adapter: str | Iterable[str] | None) -> None:
    """ValueError unless the levels are apart, of this model and, if it has PEFT's layers, not mixed up."""
    low, up = set(parameters_of(lower)), set(parameters_of(upper))
    directions, magnitudes = low, up
    if _peft_layers(model):
        directions, magnitudes = set(direction_parameters(model, adapter)), set(magnitude_parameters(model, adapter))
    faults = {
        "overlap: parameters of both": low & up,
        "hold parameters that are not in the model": (low | up) - set(model.parameters()),
        "are swapped: magnitudes are in lower": low & magnitudes if up & directions else (),
        "are mixed up: magnitudes, which belong to upper, are in lower": low & magnitudes,
        "are mixed up: parameters that are not magnitudes are in upper": up - magnitudes,
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(
                f"lower and upper {fault} ({len(found)} parameters); build lower from direction_parameters(model) and "
                "upper from magnitude_parameters(model), once this model has its adapters"
            )


def dora_layers(
    model: nn.Module, adapter: str | Iterable[str] | None, directions: Iterable[Tensor], needed: bool
) -> list[LoRALayer]:
    """PEFT's linear layers, seen through the adapters whose A is among `directions`.

    A PEFT model has none where embeddings alone are adapted: a ValueError if they are `needed`.
    """
    try:
        layers = lora_layers(model, adapter) if _peft_layers(model) else []
    except ValueError:
        if needed:
            raise
        return []
    directions = set(directions)
    trained = [{a.name for a in layer.all_adapters() if a.A_param in directions} for layer in layers]
    return [seen_through(layer, names) for layer, names in zip(layers, trained, strict=True) if names]


@torch.no_grad()
def update_correlation(layers: list[LoRALayer], norms: BaseNorms) -> Tensor | None:
    """Pearson's r of the adapters' ΔM and ΔD (DoRA, arXiv:2402.09353, Eq. 3-4); None of fewer than two.

    ΔM is the mean over the rows of ``|μ_i − ‖W0_i‖|``, ΔD that of ``1 − cos(V_i, W0_i)`` with ``V = W0 + s·B·A``; each
    adapter is looked at as if it were its layer's only one. 0 where one of them does not vary. `norms` keeps
    ``‖W0_i‖²`` for the next call.
    """
    adapters = [(layer, a) for layer in layers for a in layer.all_adapters() if a.magnitude is not None]
    if len(adapters) < 2:
        return None
    found = [_changes(layer, adapter, *norms.of([layer])) for layer, adapter in adapters]
    changes = torch.stack([pair.to(found[0].device) for pair in found], 1)
    m, d = changes - changes.mean(1, keepdim=True)
    both = m.norm() * d.norm()
    return torch.where(both > 0, (m @ d) / both, 0.0)


def _changes(layer: LoRALayer, adapter: Adapter, base_sq: Tensor) -> Tensor:
    """ΔM and ΔD of one adapter, without an (m, n) matrix.

    ``1 − cos`` is taken as ``sin²/(1 + cos)``, where nothing cancels however small ``d = s·B·A`` is:
    ``sin² = (‖W0_i‖²·‖d_i‖² − (W0_i·d_i)²) / (‖W0_i‖²·‖V_i‖²)``.
    """
    assert adapter.magnitude is not None
    dtype = sum_dtype(layer.base.device)
    crossed = layer.base.apply_rows(adapter.A).to(dtype)  # W0·Aᵀ
    A, B, base_sq = adapter.A.to(dtype), adapter.scaling * adapter.B.to(dtype), base_sq.to(dtype)
    cross, own_sq = (B * crossed).sum(1), (B * (B @ (A @ A.mT))).sum(1)
    norms_sq = (base_sq * (base_sq + 2 * cross + own_sq)).clamp(min=torch.finfo(dtype).tiny)
    sin_sq = (base_sq * own_sq - cross.square()).clamp(min=0.0) / norms_sq
    cos = (base_sq + cross) / norms_sq.sqrt()
    return torch.stack([(adapter.magnitude - base_sq.sqrt()).abs().mean(), (sin_sq / (1 + cos)).mean()])


def _peft_layers(model: nn.Module) -> list[Any]:
    """PEFT's LoRA layers, with or without magnitudes."""
    held = [module for module in model.modules() if hasattr(module, "base_layer")]
    return [module for module in held if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)]


def _dora_adapters(model: nn.Module, adapter: str | Iterable[str] | None) -> list[tuple[nn.Parameter, Any, Any]]:
    """(magnitude, A, B) of every DoRA adapter; A and B are modules, or parameters in an embedding layer."""
    layers = _peft_layers(checks.module(model))
    known = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    wanted = checks.adapters(adapter, known)
    found: list[tuple[nn.Parameter, Any, Any]] = []
    for layer in layers:
        for name, magnitude in layer.lora_magnitude_vector.items():
            if name in wanted:
                embeds = name in layer.lora_embedding_A
                A, B = (layer.lora_embedding_A, layer.lora_embedding_B) if embeds else (layer.lora_A, layer.lora_B)
                found.append((magnitude.weight, A[name], B[name]))
    if not found:
        has = f"the adapters {sorted(wanted or known)} without magnitudes" if known else "no PEFT adapters"
        raise ValueError(
            f"{type(model).__name__} has {has}; BiDoRA needs DoRA adapters: "
            "peft.get_peft_model(model, LoraConfig(use_dora=True, target_modules='all-linear'))"
        )
    return found
