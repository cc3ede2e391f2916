"""The two sets of parameters of PEFT's DoRA layers, and putting the directions back to their start."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .. import checks
from ..layers.base import whole
from ..layers.view import LoRALayer, lora_layers

__all__ = ["direction_parameters", "is_peft", "magnitude_parameters", "reset_directions", "trained_layers"]


def direction_parameters(model: nn.Module, adapter: str | Iterable[str] | None = None) -> list[nn.Parameter]:
    """A (r, n) and B (m, r) of every DoRA adapter in `model`: what `BilevelOptimizer` trains on the lower level.

    A new classification head, or whatever else is to be trained, belongs to the lower level too: add its parameters.

    Args:
        model: a PEFT model whose adapters were made with ``LoraConfig(use_dora=True)``.
        adapter: name or names of the adapters; None for all.

    Raises:
        ValueError: no such adapter has a magnitude.
    """
    modules = [part for parts in _dora_adapters(model, adapter) for part in parts[1:]]
    return [p for module in modules for p in ([module] if isinstance(module, nn.Parameter) else module.parameters())]


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
        start = torch.empty(whole(A.weight).shape, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        A.weight.copy_(start)
        for p in B.parameters():
            p.zero_()


def is_peft(model: nn.Module) -> bool:
    """Whether the model has LoRA layers of PEFT, with or without magnitudes."""
    return any(True for _ in _peft_layers(model))


def trained_layers(
    model: nn.Module, adapter: str | Iterable[str] | None, directions: Container[Any], needed: bool = True
) -> list[LoRALayer]:
    """PEFT's linear layers, seen through the adapters whose A is among `directions`.

    Raises:
        ValueError: a PEFT model has none, as where embeddings alone are adapted, and they are `needed`.
    """
    try:
        layers = lora_layers(model, adapter) if is_peft(model) else []
    except ValueError:
        if needed:
            raise
        return []
    found = []
    for layer in layers:
        if names := frozenset(a.name for a in layer.all_adapters() if a.A_param in directions):
            found.append(LoRALayer(layer.name, layer.module, layer.base, names))
    return found


def _peft_layers(model: nn.Module) -> Iterator[Any]:
    return (
        m for m in model.modules() if hasattr(m, "base_layer") and isinstance(getattr(m, "lora_A", None), nn.ModuleDict)
    )


def _dora_adapters(model: nn.Module, adapter: str | Iterable[str] | None) -> list[tuple[nn.Parameter, Any, Any]]:
    """(magnitude, A, B) of every DoRA adapter; A and B are modules, or parameters in an embedding layer."""
    checks.module(model)
    wanted = {adapter} if isinstance(adapter, str) else None if adapter is None else set(adapter)
    found: list[tuple[nn.Parameter, Any, Any]] = []
    known: set[str] = set()
    for layer in _peft_layers(model):
        known |= {*layer.lora_A, *layer.lora_embedding_A}
        for name in layer.lora_magnitude_vector:
            if wanted is None or name in wanted:
                factors = [(linear if name in linear else embedding)[name] for linear, embedding in _factors(layer)]
                found.append((layer.lora_magnitude_vector[name].weight, *factors))
    if wanted is not None and not wanted <= known:
        raise ValueError(f"unknown adapter {sorted(wanted - known)}; the model has {sorted(known) or 'no adapters'}")
    if not found:
        has = f"the adapters {sorted(wanted or known)} without magnitudes" if known else "no PEFT adapters"
        raise ValueError(
            f"{type(model).__name__} has {has}; BiDoRA needs DoRA adapters: "
            "peft.get_peft_model(model, LoraConfig(use_dora=True, target_modules='all-linear'))"
        )
    return found


def _factors(layer: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    return (layer.lora_A, layer.lora_embedding_A), (layer.lora_B, layer.lora_embedding_B)
