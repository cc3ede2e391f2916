"""Putting GraLoRA layers into a model, taking them out again, and merging them."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from .. import checks
from ..perturbation.attachment import remove_perturbation
from .contents import Before, add_save_pretrained, applied, gralora_layers, remove_save_pretrained, saved_modules
from .layer import GraLoRALinear
from .targets import check_blocks, check_numbers, find_saved, find_targets

logger = logging.getLogger("flatlora")


def apply_gralora(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    r: int = 32,
    k: int = 4,
    alpha: float = 64,
    hybrid_r: int = 0,
    dropout: float = 0.0,
    modules_to_save: Iterable[str] | None = None,
) -> nn.Module:
    """Replaces linear layers of `model` by `GraLoRALinear` over them and freezes everything else.

    GraLoRA (arXiv:2505.20355, Section 3) gives each of the k×k blocks of a weight an adapter of rank r/k:

        ΔW_ij = s·B_ij·A_ij,    s = alpha / (r + hybrid_r)

    Apply it before DDP, FSDP or `torch.compile` wrap the model. If anything is wrong, nothing has been changed.
    A transformers model then counts as one with adapters: the Trainer trains it quantised too and resumes it, and
    `save_pretrained`, checkpoints and the Hub get the adapters alone, as `save_gralora` writes them.

    Args:
        model: any module with linear layers inside.
        target_modules: the layers, as PEFT reads it: names or their endings after a dot; a string is a regular
            expression for the whole name, or ``"all-linear"`` for every linear layer but a transformers model's
            output head.
        r, k, alpha, hybrid_r, dropout: as in `GraLoRALinear`.
        modules_to_save: names, or their endings, of modules that are trained whole, on copies, and saved too.

    Returns:
        `model` itself.

    Raises:
        ValueError: r or a layer's side is not divisible by k; a name that matches nothing, or no linear layer; a model
            that has adapters already.
        TypeError: `model` is not a module.
    """
    numbers = check_numbers(r, k, alpha, hybrid_r, dropout)
    check_fresh(model)
    saved = find_saved(model, modules_to_save)
    targets = find_targets(model, target_modules, saved)
    check_blocks(targets, numbers["r"], numbers["k"])
    return install(model, targets, saved, **numbers)


def check_fresh(model: nn.Module) -> None:
    """Raises unless `model` is a module without adapters that DistributedDataParallel does not wrap yet."""
    checks.module(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("apply GraLoRA before DistributedDataParallel wraps the model, or it is never reduced")
    there = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if there is not None:
        raise ValueError(
            f"layer {there!r} has an adapter already; call unload_gralora(model) or merge_gralora(model) first (for "
            "PEFT's adapters model.unload() or model.merge_and_unload())"
        )


def install(model: nn.Module, targets: dict[str, nn.Module], saved: list[str], **settings: Any) -> nn.Module:
    """The transform itself, once everything has been checked."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = Before(trainable, {name: model.get_submodule(name) for name in saved})
    layers: dict[str, GraLoRALinear] = {}
    try:
        for name, base in targets.items():
            layers[name] = GraLoRALinear(base, **settings).train(base.training)
        # Copies, so that what is tied to them (input embeddings to the output head) stays frozen.
        copies = {name: deepcopy(module).requires_grad_(True) for name, module in before.modules.items()}
    except BaseException:  # such as a lack of memory
        for layer in layers.values():
            layer._layout.release()
        _set_trainable(model, trainable)
        raise
    model.requires_grad_(False)
    for name, module in [*layers.items(), *copies.items()]:
        model.set_submodule(name, module)
    model._before_gralora = before  # type: ignore[assignment]
    add_save_pretrained(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    message = f"GraLoRA on {len(targets)} layers: {trained:,} trainable parameters of {total:,} ({trained / total:.2%})"
    logger.info(message)
    return model


def unload_gralora(model: nn.Module) -> nn.Module:
    """Takes the adapters off: `model` is as it was before `apply_gralora`, bit for bit, and is returned.

    Whatever perturbs the model, such as GGPO's noise or an auxiliary of Bi-LoRA, comes off too. Device and mode (train
    or eval) stay what they are.

    Raises:
        ValueError: the model has no GraLoRA layers, or is one itself.
        TypeError: `model` is not a module.
    """
    layers = _adapted(model)
    remove_perturbation(model)
    for name, module in saved_modules(model).items():
        copy = model.get_submodule(name)
        device = next((parameter.device for parameter in copy.parameters()), None)
        model.set_submodule(name, module.to(device).train(copy.training))
    for name, layer in layers.items():
        _take_off(model, name, layer)
    return _forget(model)


@torch.no_grad()
def merge_gralora(model: nn.Module) -> nn.Module:
    """Folds every update into its base weight, leaves plain layers behind and returns `model`.

    Float weights become ``W0 + ΔW``, rounded once. 4-bit and 8-bit weights are dequantised, added to and quantised
    again with their own settings, which is not exact; a warning says so. Modules that were trained whole stay as
    trained. The weights are new tensors; a warning says where that undoes a tie (of input embeddings and head).
    Whatever perturbs the model comes off first. If memory runs out on the way, each layer is either merged or still
    adapted, the model computes what it did, and another call merges the rest.

    Raises:
        ValueError: the model has no GraLoRA layers, is one itself, or has a base weight that can't be written; nothing
            has been merged.
        TypeError: `model` is not a module.
    """
    layers = _adapted(model)
    for name, layer in layers.items():
        if layer.base.kind == "opaque":
            kind = type(layer.base_layer).__name__
            raise ValueError(f"layer {name!r}: the weight of a {kind} can't be merged into; merge into the float model")
    if quantised := sum(layer.base.kind != "float" for layer in layers.values()):
        warnings.warn(
            f"{quantised} quantised layers are dequantised, merged and quantised again: their outputs change by the "
            "quantisation error. To merge exactly, load the adapter on the float model",
            stacklevel=2,
        )
    if untied := _untied(model, layers):
        warnings.warn(
            f"the weights of {', '.join(untied)} were tied to those of other modules, and are not once merged; set "
            "model.config.tie_word_embeddings = False before saving, or loading ties them again, without the update",
            stacklevel=2,
        )
    remove_perturbation(model)
    for name, layer in layers.items():
        base, delta = layer.base, layer.delta_weight()
        dtype = torch.promote_types(delta.dtype, layer.weight.dtype)
        base.write(base.dense(dtype) + delta.to(base.device))
        _take_off(model, name, layer)
    return _forget(model)


def _adapted(model: nn.Module) -> dict[str, GraLoRALinear]:
    layers, name = gralora_layers(checks.module(model)), type(model).__name__
    if "" in layers:
        raise ValueError("model is a GraLoRALinear itself; pass the module that holds it")
    if not layers:
        raise ValueError(f"{name} has no GraLoRA layers; call apply_gralora(model, target_modules) first")
    return layers


def _untied(model: nn.Module, layers: dict[str, GraLoRALinear]) -> list[str]:
    """The layers, and modules that are trained whole, whose weights merging unties from others."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    whole = [name for name, one in saved_modules(model).items() if any(id(p) in holders for p in one.parameters())]
    return [name for name, layer in layers.items() if holders[id(layer.base_layer.weight)] > 1] + whole


def _take_off(model: nn.Module, name: str, layer: GraLoRALinear) -> None:
    layer._layout.release()
    model.set_submodule(name, layer.base_layer.train(layer.training))


def _forget(model: nn.Module) -> nn.Module:
    """Restores what was trainable before, once the layers are off."""
    for module in applied(model).values():
        _set_trainable(module, module._before_gralora.trainable)
        del module._before_gralora
        remove_save_pretrained(module)
    return model


def _set_trainable(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
