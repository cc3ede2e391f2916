"""GraLoRA adapters on disk, in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import whole
from ..layers.kinds import linear_base
from ..layers.view import plain_name
from .layer import GraLoRALinear
from .targets import check_blocks, check_numbers, find_saved
from .transform import check_fresh, gralora_layers, install, saved_modules

__all__ = ["load_gralora", "save_gralora"]

logger = logging.getLogger("flatlora")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHAPES = {  # of a layer (m, n)
    "gralora_A": lambda m, n, r, k, hybrid_r: (k, n // k, r),
    "gralora_B": lambda m, n, r, k, hybrid_r: (k, r, m // k),
    "gralora_A_general.weight": lambda m, n, r, k, hybrid_r: (hybrid_r, n),
    "gralora_B_general.weight": lambda m, n, r, k, hybrid_r: (m, hybrid_r),
}
# What PEFT's configuration can hold and these layers can't do.
_UNSUPPORTED = {"bias": "none"}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as reason:
        raise ImportError("adapters are saved as safetensors; install it with: pip install 'flatlora[hf]'") from reason
    return safetensors.torch


# --- saving ---------------------------------------------------------------------------------------------------------


def save_gralora(model: nn.Module, dir: str | Path) -> None:
    """Writes the adapters of `model`, and its `modules_to_save`, where ``PeftModel.from_pretrained`` can load them.

    Args:
        model: a model after `apply_gralora` or `load_gralora`.
        dir: a folder; it is made if it is not there.

    Raises:
        ValueError: the model has no GraLoRA layers, or layers of different r, k, alpha or hybrid_r, which the format
            has no words for.
        ImportError: safetensors is missing.
    """
    safetensors = _safetensors()
    layers = {plain_name(name): layer for name, layer in gralora_layers(model).items()}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no GraLoRA layers; there is nothing to save")
    first = next(iter(layers.values()))
    settings = _settings(first)
    for name, layer in layers.items():
        if _settings(layer) != settings:
            raise ValueError(
                f"layer {name!r} has {_settings(layer)}, others {settings}; PEFT's format holds one of each"
            )
    tensors = {
        f"{_PREFIX}{name}.{key}": value
        for name, layer in layers.items()
        for key, value in layer.state_dict(keep_vars=True).items()
        if key in _SHAPES
    }
    saved = saved_modules(model)
    for name in saved:
        for key, value in model.get_submodule(name).state_dict(keep_vars=True).items():
            tensors[f"{_PREFIX}{plain_name(name)}.{key}"] = value
    config = _config(model, layers, [plain_name(name) for name in saved])
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    copies = {key: whole(value.detach()).cpu().clone().contiguous() for key, value in tensors.items()}
    safetensors.save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settings(layer: GraLoRALinear) -> dict[str, Any]:
    """In the words of PEFT's `GraloraConfig`."""
    return {"r": layer.r, "gralora_k": layer.k, "alpha": layer.alpha, "hybrid_r": layer.hybrid_r}


def _config(model: nn.Module, layers: dict[str, GraLoRALinear], saved: list[str]) -> dict[str, Any]:
    first = next(iter(layers.values()))
    names = {plain_name(name) for name, _ in model.named_modules()}
    # PEFT adapts whatever ends in a name of the list; where that would be more, a regular expression says it exactly.
    exact = not any(other.endswith(f".{name}") for other in names - layers.keys() for name in layers)
    return {
        "peft_type": "GRALORA",
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        **_settings(first),
        "gralora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": list(layers) if exact else "|".join(map(re.escape, layers)),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(type(layer.base_layer).__name__ == "Conv1D" for layer in layers.values()),
        "bias": "none",
        "init_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
        "task_type": None,
    }


# --- loading --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_gralora(model: nn.Module, dir: str | Path) -> nn.Module:
    """Loads an adapter that `save_gralora` or PEFT wrote; the adapter stays trainable.

    A plain model gets GraLoRA layers first, on the layers the file has weights for; a model that has them must have
    the file's. The log says so where the file names another base model than `model` was loaded from; a base that the
    weights do not fit is an error. If anything is wrong, nothing has been changed.

    Args:
        model: the base model, or one after `apply_gralora` with the same layers and numbers.
        dir: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        `model` itself.

    Raises:
        ValueError: another kind of adapter; a layer that the model does not have; another shape, r, k, alpha or
            hybrid_r than the model's layers have; missing or unknown weights.
        FileNotFoundError: the folder lacks one of the files.
        ImportError: safetensors is missing.
    """
    safetensors = _safetensors()
    folder = Path(dir)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}; expected a folder that save_gralora or PEFT wrote")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "GRALORA":
        raise ValueError(f"{folder / CONFIG} is of a {config.get('peft_type')} adapter; expected GRALORA")
    for key, only in _UNSUPPORTED.items():
        if config.get(key, only) != only:
            raise ValueError(f"{folder / CONFIG} has {key}={config[key]!r}; only {only!r} can be loaded")
    tensors = safetensors.load_file(folder / WEIGHTS)
    settings = {key: config[key] for key in ("r", "gralora_k", "alpha", "hybrid_r")}
    by_layer, others = _by_layer(tensors)

    present = gralora_layers(model)
    saved = saved_modules(model) if present else find_saved(model, config.get("modules_to_save"))
    if present:
        _check_present(present, by_layer, settings)
        bases: dict[str, nn.Module] = {name: layer.base_layer for name, layer in present.items()}
    else:
        check_fresh(model)
        bases = _bases(model, by_layer)
    _check_layers(bases, by_layer, settings)
    _check_saved(model, saved, others)

    theirs, ours = config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if theirs and ours and theirs != ours:
        logger.warning("the adapter was trained on %r, this model is %r", theirs, ours)
    if not present:
        numbers = {"r": settings["r"], "k": settings["gralora_k"], "alpha": settings["alpha"]}
        dropout = config.get("gralora_dropout", 0.0)
        install(model, bases, saved, **numbers, hybrid_r=settings["hybrid_r"], dropout=dropout)
    own = {plain_name(key): value for key, value in model.state_dict(keep_vars=True).items()}
    for key, value in tensors.items():
        own[key.removeprefix(_PREFIX)].copy_(value)
    return model


def _by_layer(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The adapters' weights by layer, and the rest, which are those of modules that are saved whole."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in tensors.items():
        name, found, part = key.removeprefix(_PREFIX).rpartition(".gralora_")
        if found:
            by_layer.setdefault(name, {})["gralora_" + part] = value
        else:
            others[key.removeprefix(_PREFIX)] = value
    return by_layer, others


def _bases(model: nn.Module, names: Any) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or linear_base(modules[name]) is None:
            found = type(modules[name]).__name__ if name in modules else "no such module"
            raise ValueError(f"the adapter is for another base: layer {name!r} is {found} in {type(model).__name__}")
    return {name: modules[name] for name in modules if name in names}


def _check_present(present: dict[str, GraLoRALinear], by_layer: Any, settings: dict[str, Any]) -> None:
    if present.keys() != by_layer.keys():
        odd = sorted(present.keys() ^ by_layer.keys())
        raise ValueError(
            f"the adapter has {len(by_layer)} layers, the model {len(present)}; found in one alone: "
            f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}. Call unload_gralora(model) and load on the base"
        )
    for name, layer in present.items():
        if _settings(layer) != settings:
            raise ValueError(
                f"the adapter has {settings}, layer {name!r} of the model {_settings(layer)}. Call "
                "unload_gralora(model) and load on the base"
            )


def _check_layers(
    bases: dict[str, nn.Module], by_layer: dict[str, dict[str, Tensor]], settings: dict[str, Any]
) -> None:
    r, k, hybrid_r = settings["r"], settings["gralora_k"], settings["hybrid_r"]
    check_numbers(r, k, settings["alpha"], hybrid_r, 0.0)
    check_blocks(bases, r, k)
    for name, base in bases.items():
        m, n = linear_base(base).shape  # type: ignore[union-attr]
        expected = {part: shape(m, n, r, k, hybrid_r) for part, shape in _SHAPES.items()}
        if not hybrid_r:
            expected = {part: shape for part, shape in expected.items() if "general" not in part}
        found = {part: tuple(value.shape) for part, value in by_layer[name].items()}
        if found != expected:
            raise ValueError(
                f"the adapter does not fit layer {name!r} ({n} inputs, {m} outputs) with {settings}: expected "
                f"{expected}, found {found}"
            )


def _check_saved(model: nn.Module, saved: list[str], others: dict[str, Tensor]) -> None:
    expected = {
        f"{name}.{key}": tuple(value.shape)
        for name in saved
        for key, value in model.get_submodule(name).state_dict().items()
    }
    found = {name: tuple(value.shape) for name, value in others.items()}
    if found != expected:
        odd = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))[0]
        raise ValueError(
            f"the adapter's modules_to_save do not fit: {odd!r} is {found.get(odd, 'missing')} in the file and "
            f"{expected.get(odd, 'not saved whole')} in the model"
        )
