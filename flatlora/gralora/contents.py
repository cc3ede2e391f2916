"""What a model with GraLoRA holds and saves: its layers, and the modules that are trained whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..layers.base import full_tensor
from ..layers.view import plain_name
from .disk import write_adapter, write_weights
from .layer import GraLoRALinear
from .targets import inside

PREFIX = "base_model.model."  # of every name in PEFT's files


@dataclass
class Before:
    """What `unload_gralora` restores beside the base layers; held by the module that `apply_gralora` was given."""

    trainable: set[str]
    modules: dict[str, nn.Module]


def gralora_layers(model: nn.Module) -> dict[str, GraLoRALinear]:
    """The GraLoRA layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GraLoRALinear)}


def applied(model: nn.Module) -> dict[str, Any]:
    """The modules that `apply_gralora` was given, by name in `model`, which may be a wrapper around them."""
    return {name: module for name, module in model.named_modules() if "_before_gralora" in module.__dict__}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The original modules, by full name, of which copies are trained whole."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, root in applied(model).items()
        for name, module in root._before_gralora.modules.items()
    }


def shapes(m: int, n: int, r: int, k: int, hybrid_r: int) -> dict[str, tuple[int, ...]]:
    """The adapter's weights over a layer (m, n), by name."""
    found: dict[str, tuple[int, ...]] = {"gralora_A": (k, n // k, r), "gralora_B": (k, r, m // k)}
    if hybrid_r:
        found |= {"gralora_A_general.weight": (hybrid_r, n), "gralora_B_general.weight": (m, hybrid_r)}
    return found


def settings_of(layer: GraLoRALinear) -> dict[str, Any]:
    """In the words of PEFT's `GraloraConfig`."""
    dropout = getattr(layer.dropout, "p", 0.0)
    numbers = {"r": layer.r, "gralora_k": layer.k, "alpha": layer.alpha, "hybrid_r": layer.hybrid_r}
    return {**numbers, "gralora_dropout": dropout}


def adapter_of(model: nn.Module, state_dict: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of a model's adapters, as PEFT's two files hold them.

    The weights are full tensors on the CPU that share no memory, as safetensors asks. They are taken from the model's
    `state_dict` if it is given; otherwise a sharded model is gathered, on every rank.
    """
    found = gralora_layers(checks.module(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no GraLoRA layers; there is nothing to save")
    saved = saved_modules(model)
    layers = {plain_name(name): layer for name, layer in found.items()}
    config = _config(model, layers, [plain_name(name) for name in saved])
    if state_dict is None:
        state_dict = {
            f"{name}.{key}": value
            for name in (*found, *saved)
            for key, value in model.get_submodule(name).state_dict(keep_vars=True).items()
        }
    own = {f"{name}.{key}" for name in layers for key in shapes(1, 1, 1, 1, 1)}
    weights = {
        f"{PREFIX}{name}": full_tensor(value.detach()).cpu().clone().contiguous()
        for key, value in state_dict.items()
        if (name := plain_name(key)) in own or inside(name, map(plain_name, saved)) is not None
    }
    if missing := sorted(name for name in layers if f"{PREFIX}{name}.gralora_A" not in weights):
        raise ValueError(f"state_dict has no adapter of {len(missing)} layers (first: {missing[0]!r})")
    return config, weights


def _config(model: nn.Module, layers: dict[str, GraLoRALinear], saved: list[str]) -> dict[str, Any]:
    common = settings_of(next(iter(layers.values())))
    for name, layer in layers.items():
        if (own := settings_of(layer)) != common:
            raise ValueError(f"layer {name!r} has {own}, others {common}; PEFT's format holds one of each")
    names = {plain_name(name) for name, _ in model.named_modules()}
    # PEFT adapts whatever ends in a listed name; where that would be too much, a regular expression is exact.
    exact = not any(other.endswith(f".{name}") for other in names - layers.keys() for name in layers)
    return {
        "peft_type": "GRALORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        **common,
        "target_modules": list(layers) if exact else "|".join(map(re.escape, layers)),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(type(layer.base_layer).__name__ == "Conv1D" for layer in layers.values()),
        "bias": "none",
        "init_weights": True,
        "inference_mode": True,
        **dict.fromkeys(["layers_to_transform", "layers_pattern", "revision", "task_type"]),
    }


# --- a transformers model: the Trainer trains it, quantised too, and saves its adapters alone ------------------------
#
# transformers marks a model that PEFT put adapters into by `_hf_peft_config_loaded`. With it the Trainer takes a
# quantised model, and gradient checkpointing has the embeddings' output require a gradient; both are right for GraLoRA.
# To save such a model, transformers looks for PEFT's own layers, so the model gets a `save_pretrained` of its own.

_FLAG, _HOOK = "_hf_peft_config_loaded", "_quiet_about_frozen"


def add_save_pretrained(model: nn.Module) -> None:
    """Marks a transformers model as one with adapters, and has it save them; does nothing to other modules."""
    if hasattr(type(model), _FLAG):
        hook = model.register_load_state_dict_post_hook(_quiet_about_frozen)
        model.__dict__.update({_FLAG: True, "save_pretrained": partial(_save_pretrained, model), _HOOK: hook})


def remove_save_pretrained(model: nn.Module) -> None:
    """Undoes `add_save_pretrained`."""
    if _HOOK in model.__dict__:
        model.__dict__.pop(_HOOK).remove()
        del model.__dict__[_FLAG], model.__dict__["save_pretrained"]


def _quiet_about_frozen(model: nn.Module, keys: Any) -> None:
    """Keeps the Trainer from listing the frozen base as missing from a checkpoint of all that is trained."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if set(keys.missing_keys) == frozen:
        keys.missing_keys.clear()


def _save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Writes the adapters alone, as `save_gralora` does; options for a whole model's files are ignored.

    The Trainer resumes, and loads its best model, from a ``model.safetensors``. So a folder that is one of its
    checkpoints gets one too, with all that training changes.
    """
    if not is_main_process and state_dict is not None:
        return  # where nothing is saved it may be empty
    folder = Path(save_directory)
    config, weights = adapter_of(model, state_dict)
    trained = _trained(model, state_dict) if re.fullmatch(r"checkpoint-\d+", folder.name) else {}
    if not is_main_process:
        return
    write_adapter(folder, config, weights)
    if trained:
        own = {key.removeprefix(PREFIX): value for key, value in weights.items()}
        write_weights(folder / "model.safetensors", {**trained, **own})
    if push_to_hub:
        model.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)


def _trained(model: nn.Module, state_dict: dict[str, Any] | None) -> dict[str, Tensor]:
    """All that a step may change, such as an unfrozen norm's weight and its buffers."""
    state = model.state_dict(keep_vars=True) if state_dict is None else state_dict
    names = {name for name, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers()}
    return {name: full_tensor(state[name].detach()).cpu().clone().contiguous() for name in state if name in names}
