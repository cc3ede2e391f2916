"""What a model with GraLoRA holds: its layers, its modules that are trained whole, and what of both is saved."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..layers.base import full_tensor
from ..layers.view import plain_name
from .layer import GraLoRALinear
from .targets import inside

__all__ = ["PREFIX", "SHAPES", "Before", "adapter", "gralora_layers", "records", "saved_modules", "settings_of"]

PREFIX = "base_model.model."  # of every name in PEFT's files
SHAPES = {  # of a layer (m, n)
    "gralora_A": lambda m, n, r, k, hybrid_r: (k, n // k, r),
    "gralora_B": lambda m, n, r, k, hybrid_r: (k, r, m // k),
    "gralora_A_general.weight": lambda m, n, r, k, hybrid_r: (hybrid_r, n),
    "gralora_B_general.weight": lambda m, n, r, k, hybrid_r: (m, hybrid_r),
}


@dataclass
class Before:
    """What `unload_gralora` puts back beside the base layers; held by the module that `apply_gralora` was given."""

    trainable: set[str]
    modules: dict[str, nn.Module] = field(default_factory=dict)


def gralora_layers(model: nn.Module) -> dict[str, GraLoRALinear]:
    """The GraLoRA layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GraLoRALinear)}


def records(model: nn.Module) -> dict[str, tuple[nn.Module, Before]]:
    """The modules that `apply_gralora` was given, by name in `model`, which may be a wrapper around them."""
    return {
        name: (module, module.__dict__["_before_gralora"])
        for name, module in model.named_modules()
        if "_before_gralora" in module.__dict__
    }


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `apply_gralora` found where copies of them are trained whole, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, (_, before) in records(model).items()
        for name, module in before.modules.items()
    }


def adapter(model: nn.Module, state_dict: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of a model's adapters, as PEFT's two files hold them.

    The weights are whole, on the CPU, and share no memory, as safetensors asks. They are taken from `state_dict`, the
    model's as others have gathered it, if it is given; else a sharded model is gathered, on every rank.

    Raises:
        ValueError: the model has no GraLoRA layers, or layers of different settings, which the format has no words for;
            `state_dict` lacks some.
    """
    layers = {plain_name(name): layer for name, layer in gralora_layers(checks.module(model)).items()}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no GraLoRA layers; there is nothing to save")
    config = _config(model, layers)
    if state_dict is None:
        state_dict = {
            f"{name}.{key}": value
            for name in (*gralora_layers(model), *saved_modules(model))
            for key, value in model.get_submodule(name).state_dict(keep_vars=True).items()
        }
    own = {f"{name}.{key}" for name in layers for key in SHAPES}
    saved = [plain_name(name) for name in saved_modules(model)]
    weights = {
        f"{PREFIX}{name}": full_tensor(value.detach()).cpu().clone().contiguous()
        for key, value in state_dict.items()
        if (name := plain_name(key)) in own or inside(name, saved) is not None
    }
    if missing := sorted(name for name in layers if f"{PREFIX}{name}.gralora_A" not in weights):
        raise ValueError(f"state_dict has no adapter of {len(missing)} layers (first: {missing[0]!r})")
    return config, weights


def settings_of(layer: GraLoRALinear) -> dict[str, Any]:
    """In the words of PEFT's `GraloraConfig`."""
    return {"r": layer.r, "gralora_k": layer.k, "alpha": layer.alpha, "hybrid_r": layer.hybrid_r}


def _common_settings(layers: dict[str, GraLoRALinear]) -> dict[str, Any]:
    found = {name: {**settings_of(layer), "gralora_dropout": _dropout(layer)} for name, layer in layers.items()}
    common = next(iter(found.values()))
    for name, settings in found.items():
        if settings != common:
            raise ValueError(f"layer {name!r} has {settings}, others {common}; PEFT's format holds one of each")
    return common


def _dropout(layer: GraLoRALinear) -> float:
    return getattr(layer.dropout, "p", 0.0)


def _config(model: nn.Module, layers: dict[str, GraLoRALinear]) -> dict[str, Any]:
    names = {plain_name(name) for name, _ in model.named_modules()}
    # PEFT adapts whatever ends in a name of the list; where that would be more, a regular expression says it exactly.
    exact = not any(other.endswith(f".{name}") for other in names - layers.keys() for name in layers)
    return {
        "peft_type": "GRALORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        **_common_settings(layers),
        "target_modules": list(layers) if exact else "|".join(map(re.escape, layers)),
        "modules_to_save": [plain_name(name) for name in saved_modules(model)] or None,
        "fan_in_fan_out": any(type(layer.base_layer).__name__ == "Conv1D" for layer in layers.values()),
        "bias": "none",
        "init_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
        "task_type": None,
    }
