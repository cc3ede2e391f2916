"""GraLoRA adapters on disk, in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..layers.bases import linear_base
from ..layers.view import plain_name
from .contents import PREFIX, adapter_of, gralora_layers, saved_modules, settings_of, shapes
from .disk import NUMBERS, read_adapter, write_adapter
from .layer import GraLoRALinear
from .targets import check_blocks, check_numbers, find_saved, inside
from .transform import check_fresh, install

logger = logging.getLogger("flatlora")


def save_gralora(model: nn.Module, dir: str | Path) -> None:
    """Writes the adapters of `model`, and its `modules_to_save`, where ``PeftModel.from_pretrained`` can load them.

    After any fault, such as a kill or a full disk, `load_gralora` finds the old adapter or the new one, whole.
    Other files in the folder are left alone. A sharded model (FSDP2) is gathered: call it on every rank.

    Args:
        model: a model after `apply_gralora` or `load_gralora`, also one that DDP or `torch.compile` wraps.
        dir: a folder; it is made if it is not there.

    Raises:
        ValueError: the model has no GraLoRA layers, or layers of different r, k, alpha, hybrid_r or dropout, which the
            format can't hold.
        OSError: the files can't be written.
        TypeError: `model` is not a module.
        ImportError: safetensors is missing.
    """
    write_adapter(Path(dir), *adapter_of(model))


@torch.no_grad()
def load_gralora(model: nn.Module, dir: str | Path) -> nn.Module:
    """Loads an adapter that `save_gralora` or PEFT wrote; the adapter stays trainable.

    A plain model gets GraLoRA layers first, where the file has weights; a model with GraLoRA layers must have the
    file's. A warning says if the file names another base model than `model` was loaded from. If anything is wrong,
    nothing has been changed.

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
    numbers = _check_config(config, source)
    weights = _by_plain_name(tensors)
    names = {key.rpartition(".gralora_")[0] for key in weights if ".gralora_" in key}
    if not names:
        raise ValueError(f"{dir} has no weights of GraLoRA layers")
    settings = {key: config[key] for key in NUMBERS}
    bases = _bases_of_present(present, names, settings) if present else _bases_of_fresh(model, names)
    saved = list(saved_modules(model)) if present else find_saved(model, config.get("modules_to_save"))
    check_blocks(bases, numbers["r"], numbers["k"])
    _check_weights(weights, _expected(model, bases, saved, numbers), settings)

    theirs, ours = config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if theirs and ours and theirs != ours:
        logger.warning("the adapter was trained on %r, this model is %r", theirs, ours)
    if not present:
        install(model, bases, saved, **numbers)
    own = {plain_name(key): value for key, value in model.state_dict(keep_vars=True).items()}
    for key, value in weights.items():
        own[key].copy_(value)
    return model


def _check_config(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The arguments of `GraLoRALinear` that a configuration stands for."""
    if config.get("peft_type") != "GRALORA":
        raise ValueError(f"{source} is of a {config.get('peft_type')} adapter; expected GRALORA")
    if missing := [key for key in NUMBERS if key not in config]:
        raise ValueError(f"the configuration in {source} lacks {', '.join(missing)}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{source} has bias={config['bias']!r}; only 'none' can be loaded")
    r, k, alpha, hybrid_r = (config[key] for key in NUMBERS)
    try:
        return check_numbers(r, k, alpha, hybrid_r, config.get("gralora_dropout", 0.0))
    except ValueError as reason:
        raise ValueError(f"the configuration in {source} can't be used: {reason}") from reason


def _by_plain_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their names in the model."""
    for stored in tensors:
        if stored.startswith(PREFIX) and (key := stored.removeprefix(PREFIX)) in tensors:
            raise ValueError(f"the adapter has weights for {key!r} twice, as {key!r} and as {stored!r}")
    return {stored.removeprefix(PREFIX): value for stored, value in tensors.items()}


def _bases_of_fresh(model: nn.Module, names: set[str]) -> dict[str, nn.Module]:
    """The layers of those names in a model without adapters, in the model's order."""
    check_fresh(model)
    modules = dict(model.named_modules())
    for name in sorted(names):
        if name not in modules or linear_base(modules[name]) is None:
            found = type(modules[name]).__name__ if name in modules else "no such module"
            raise ValueError(f"the adapter is for another base: layer {name!r} is {found} in {type(model).__name__}")
    return {name: modules[name] for name in modules if name in names}


def _bases_of_present(
    present: dict[str, GraLoRALinear], names: set[str], settings: dict[str, Any]
) -> dict[str, nn.Module]:
    """The base layers of a model's GraLoRA layers, which must be those of the adapter."""
    layers = {plain_name(name): layer for name, layer in present.items()}
    instead = "Call unload_gralora(model) and load on the base"
    if odd := sorted(layers.keys() ^ names):
        raise ValueError(
            f"the adapter has {len(names)} layers, the model {len(layers)}; found in one alone: {checks.some(odd)}. "
            + instead
        )
    for name, layer in layers.items():
        own = {key: value for key, value in settings_of(layer).items() if key in settings}
        if own != settings:
            raise ValueError(f"the adapter has {settings}, layer {name!r} of the model {own}. {instead}")
    return {name: layer.base_layer for name, layer in layers.items()}


def _expected(
    model: nn.Module, bases: dict[str, nn.Module], saved: list[str], numbers: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every weight that the adapter must have, by name in the model."""
    expected = {}
    whole = [plain_name(name) for name in saved]
    for name, base in bases.items():
        if inside(name, whole) is not None:
            raise ValueError(f"the adapter has weights for layer {name!r}, which its modules_to_save hold whole too")
        if base.weight.device.type == "meta":
            raise ValueError(f"layer {name!r} is on the meta device, which holds no values; load the base model first")
        m, n = linear_base(base).shape  # type: ignore[union-attr]
        for part, shape in shapes(m, n, numbers["r"], numbers["k"], numbers["hybrid_r"]).items():
            expected[f"{name}.{part}"] = shape, torch.float32
    for name, plain in zip(saved, whole, strict=True):
        for key, value in model.get_submodule(name).state_dict().items():
            expected[f"{plain}.{key}"] = tuple(value.shape), value.dtype
    return expected


def _check_weights(
    weights: dict[str, Tensor], expected: dict[str, tuple[tuple[int, ...], torch.dtype]], settings: dict[str, Any]
) -> None:
    """ValueError unless the weights are those expected, in dtypes that can be copied for what they are."""
    for key in sorted(weights.keys() | expected.keys()):
        found = tuple(weights[key].shape) if key in weights else None
        shape, dtype = expected.get(key, (None, torch.float32))
        layer, is_adapter, part = key.rpartition(".gralora_")
        if found != shape and is_adapter:
            raise ValueError(
                f"the adapter does not fit layer {layer!r} with {settings}: expected gralora_{part} "
                f"{shape or 'missing'}, found {found or 'missing'}"
            )
        if found != shape:
            raise ValueError(
                f"the adapter's modules_to_save do not fit: {key!r} is {'missing' if found is None else found} in the "
                f"file and {'not saved whole' if shape is None else shape} in the model"
            )
        given = weights[key]
        if given.dtype != dtype and not (given.is_floating_point() and dtype.is_floating_point):
            kind = "a float" if dtype.is_floating_point else dtype
            raise ValueError(f"the adapter's weight {key!r} is of {given.dtype}; expected {kind} dtype")
