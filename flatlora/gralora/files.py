"""GraLoRA adapters on disk, in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.bases import linear_base
from ..layers.view import plain_name
from .contents import PREFIX, SHAPES, adapter, gralora_layers, saved_modules, settings_of
from .disk import read_adapter, write_adapter
from .layer import GraLoRALinear
from .targets import check_blocks, check_numbers, find_saved, inside
from .transform import check_fresh, install

__all__ = ["load_gralora", "save_gralora"]

logger = logging.getLogger("flatlora")

_NUMBERS = ("r", "gralora_k", "alpha", "hybrid_r")


# --- saving ---------------------------------------------------------------------------------------------------------


def save_gralora(model: nn.Module, dir: str | Path) -> None:
    """Writes the adapters of `model`, and its `modules_to_save`, where ``PeftModel.from_pretrained`` can load them.

    Whatever goes wrong, be it a kill or a full disk, `load_gralora` then finds the old adapter or the new one, whole.
    Other files in the folder are left alone. A sharded model (FSDP2) is gathered: call it on every rank.

    Args:
        model: a model after `apply_gralora` or `load_gralora`, also one that DDP or `torch.compile` wraps.
        dir: a folder; it is made if it is not there.

    Raises:
        ValueError: the model has no GraLoRA layers, or layers of different r, k, alpha, hybrid_r or dropout, which the
            format has no words for.
        OSError: the files can't be written.
        TypeError: `model` is not a module.
        ImportError: safetensors is missing.
    """
    write_adapter(Path(dir), *adapter(model))


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
        ValueError: another kind of adapter; files that are broken or of two adapters; a layer that the model does not
            have; another shape, r, k, alpha or hybrid_r than the model's layers have; missing or unknown weights.
        FileNotFoundError: the folder lacks one of the files.
        TypeError: `model` is not a module.
        ImportError: safetensors is missing.
    """
    present = gralora_layers(checks.module(model))
    config, tensors, source = read_adapter(Path(dir))
    settings = _check_config(config, source)
    by_layer, others = _by_layer(tensors)
    if not by_layer:
        raise ValueError(f"{dir} has no weights of GraLoRA layers")
    bases = _bases_of_present(present, by_layer, settings) if present else _bases_of_fresh(model, by_layer)
    saved = list(saved_modules(model)) if present else find_saved(model, config.get("modules_to_save"))
    _check_layers(bases, by_layer, settings)
    _check_saved(model, saved, others, by_layer)

    _tell_of_another_base(config, model)
    if not present:
        install(model, bases, saved, **_words(settings), dropout=config.get("gralora_dropout", 0.0))
    own = {plain_name(key): value for key, value in model.state_dict(keep_vars=True).items()}
    for key, value in tensors.items():
        own[key.removeprefix(PREFIX)].copy_(value)
    return model


def _words(settings: dict[str, Any]) -> dict[str, Any]:
    """PEFT's words in those of `apply_gralora`."""
    return {"k" if key == "gralora_k" else key: value for key, value in settings.items()}


def _check_config(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The numbers of a GraLoRA configuration that these layers can do, in PEFT's words."""
    if config.get("peft_type") != "GRALORA":
        raise ValueError(f"{source} is of a {config.get('peft_type')} adapter; expected GRALORA")
    missing = [key for key in _NUMBERS if key not in config]
    if missing:
        raise ValueError(f"the configuration in {source} lacks {', '.join(missing)}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{source} has bias={config['bias']!r}; only 'none' can be loaded")
    settings = {key: config[key] for key in _NUMBERS}
    try:
        check_numbers(**_words(settings), dropout=config.get("gralora_dropout", 0.0))
    except ValueError as reason:
        raise ValueError(f"the configuration in {source} can't be used: {reason}") from reason
    return settings


def _by_layer(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The adapters' weights by layer, and the rest, which are those of modules that are saved whole."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    others = {}
    for stored, value in tensors.items():
        key = stored.removeprefix(PREFIX)
        if key != stored and key in tensors:
            raise ValueError(f"the adapter has weights for {key!r} twice, as {key!r} and as {stored!r}")
        name, found, part = key.rpartition(".gralora_")
        if found:
            by_layer.setdefault(name, {})["gralora_" + part] = value
        else:
            others[key] = value
    return by_layer, others


def _bases_of_fresh(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers that `names` are of in a model without adapters, in the model's order."""
    check_fresh(model)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or linear_base(modules[name]) is None:
            found = type(modules[name]).__name__ if name in modules else "no such module"
            raise ValueError(f"the adapter is for another base: layer {name!r} is {found} in {type(model).__name__}")
    return {name: modules[name] for name in modules if name in names}


def _bases_of_present(
    present: dict[str, GraLoRALinear], names: Iterable[str], settings: dict[str, Any]
) -> dict[str, nn.Module]:
    """The base layers of a model whose GraLoRA layers are those that the adapter has weights for."""
    layers = {plain_name(name): layer for name, layer in present.items()}
    odd = sorted(layers.keys() ^ set(names))
    if odd:
        raise ValueError(
            f"the adapter has {len(set(names))} layers, the model {len(layers)}; found in one alone: "
            f"{', '.join(odd[:3])}{' and others' if len(odd) > 3 else ''}. Call unload_gralora(model) and load on the "
            "base"
        )
    for name, layer in layers.items():
        if settings_of(layer) != settings:
            raise ValueError(
                f"the adapter has {settings}, layer {name!r} of the model {settings_of(layer)}. Call "
                "unload_gralora(model) and load on the base"
            )
    return {name: layer.base_layer for name, layer in layers.items()}


def _check_layers(
    bases: dict[str, nn.Module], by_layer: dict[str, dict[str, Tensor]], settings: dict[str, Any]
) -> None:
    r, k, hybrid_r = settings["r"], settings["gralora_k"], settings["hybrid_r"]
    check_blocks(bases, r, k)
    for name, base in bases.items():
        if base.weight.device.type == "meta":
            raise ValueError(f"layer {name!r} is on the meta device, which holds no values; load the base model first")
        m, n = linear_base(base).shape  # type: ignore[union-attr]
        expected = {part: shape(m, n, r, k, hybrid_r) for part, shape in SHAPES.items()}
        if not hybrid_r:
            expected = {part: shape for part, shape in expected.items() if "general" not in part}
        found = {part: tuple(value.shape) for part, value in by_layer[name].items()}
        if found != expected:
            raise ValueError(
                f"the adapter does not fit layer {name!r} ({n} inputs, {m} outputs) with {settings}: expected "
                f"{expected}, found {found}"
            )
        for part, value in by_layer[name].items():
            _check_dtype(f"{name}.{part}", value, torch.float32)


def _check_saved(model: nn.Module, saved: list[str], others: dict[str, Tensor], adapted: Iterable[str]) -> None:
    names = {plain_name(name): model.get_submodule(name) for name in saved}
    both = next((name for name in adapted if inside(name, names) is not None), None)
    if both is not None:
        raise ValueError(f"the adapter has weights for layer {both!r}, which its modules_to_save hold whole as well")
    own = {f"{name}.{key}": value for name, module in names.items() for key, value in module.state_dict().items()}
    expected = {key: tuple(value.shape) for key, value in own.items()}
    found = {key: tuple(value.shape) for key, value in others.items()}
    if found != expected:
        odd = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))[0]
        raise ValueError(
            f"the adapter's modules_to_save do not fit: {odd!r} is {found.get(odd, 'missing')} in the file and "
            f"{expected.get(odd, 'not saved whole')} in the model"
        )
    for key, value in others.items():
        _check_dtype(key, value, own[key].dtype)


def _check_dtype(key: str, value: Tensor, own: torch.dtype) -> None:
    """ValueError unless `value` can be copied into a tensor of dtype `own` for what it is."""
    if value.dtype != own and not (value.is_floating_point() and own.is_floating_point):
        kind = "a float" if own.is_floating_point else own
        raise ValueError(f"the adapter's weight {key!r} is of {value.dtype}; expected {kind} dtype")


def _tell_of_another_base(config: dict[str, Any], model: nn.Module) -> None:
    theirs, ours = config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if theirs and ours and theirs != ours:
        logger.warning("the adapter was trained on %r, this model is %r", theirs, ours)
