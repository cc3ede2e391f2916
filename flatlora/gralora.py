"""GraLoRA: one low-rank adapter per block of the weight, so that the update's rank is k times that of LoRA."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .base_weight import BaseWeight, keep_training_layout, linear_base, release_layout
from .blocks import AddBlocks, add_blocks
from .layers import block_factors
from .perturbation import add_low_rank, compute_dtype, is_transparent
from .targets import check_blocks, check_numbers, find_saved, find_targets

__all__ = ["GraLoRALinear", "apply_gralora", "merge_gralora", "unload_gralora"]

logger = logging.getLogger("flatlora")


class GraLoRALinear(nn.Module):
    """A frozen linear layer whose weight (m, n) gets an own low-rank adapter in each of its k×k blocks.

    GraLoRA (arXiv:2505.20355, Section 3) adds ``ΔW_ij = s·B_ij·A_ij`` to block row i, block column j, with ``A_ij``
    (r/k, n/k), ``B_ij`` (m/k, r/k) and ``s = alpha / (r + hybrid_r)``: the parameters and the arithmetic of a LoRA of
    rank r, an update of rank up to k·r, and an outlier among the inputs reaches the adapters of its own block column
    alone. A hybrid has a plain LoRA of rank `hybrid_r` beside the blocks.

    Parameters are named, shaped and initialised as PEFT's: ``gralora_A`` (k, n/k, r), Kaiming-uniform, ``gralora_B``
    (k, r, m/k), zero; of a hybrid ``gralora_A_general.weight`` (hybrid_r, n) and ``gralora_B_general.weight``
    (m, hybrid_r). They are float32, or float64 where the base is.

    Args:
        base: `nn.Linear`, `Conv1D`, or bitsandbytes' `Linear4bit` or `Linear8bitLt`. It is frozen and kept as it is.
        r: rank of the whole; each block has ``r / k``.
        k: blocks along each side of the weight. The paper takes 2 up to rank 32, and 4 from rank 64.
        alpha: numerator of the scaling.
        hybrid_r: rank of the plain LoRA beside the blocks.
        dropout: probability of dropping an element of the adapters' input while training.

    Raises:
        ValueError: r, m or n is not divisible by k; a number out of its range.
        TypeError: `base` is no such layer.
    """

    base_layer: Any
    gralora_A_general: Any
    gralora_B_general: Any

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int = 32,
        k: int = 4,
        alpha: float = 64,
        hybrid_r: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_numbers(r, k, alpha, hybrid_r, dropout)
        weight = linear_base(base)
        if weight is None:
            raise TypeError(f"base must be nn.Linear, Conv1D, Linear4bit or Linear8bitLt, got {type(base).__name__}")
        m, n = weight.shape
        check_blocks({"base": base}, r, k)
        self.base_layer = base.requires_grad_(False)
        self.r, self.k, self.alpha, self.hybrid_r = r, k, alpha, hybrid_r
        self.scaling = alpha / (r + hybrid_r)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

        like: Any = base.weight
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # Drawn from the global stream in PEFT's order: the same seed gives the same adapter.
        rows = [_kaiming(torch.empty(r, n // k)) for _ in range(k)]
        self.gralora_A = nn.Parameter(torch.stack(rows).mT.contiguous().to(like.device, dtype))
        self.gralora_B = nn.Parameter(torch.zeros(k, r, m // k, device=like.device, dtype=dtype))
        self.gralora_A_general = self.gralora_B_general = None
        if hybrid_r:
            self.gralora_A_general = nn.Linear(n, hybrid_r, bias=False)
            self.gralora_B_general = nn.Linear(hybrid_r, m, bias=False)
            _kaiming(self.gralora_A_general.weight)
            nn.init.zeros_(self.gralora_B_general.weight)
            self.gralora_A_general.to(like.device, dtype)
            self.gralora_B_general.to(like.device, dtype)
        self._held = keep_training_layout(base)

    def forward(self, x: Tensor) -> Tensor:
        own = not torch.compiler.is_compiling() and self.base.kind == "float" and is_transparent(self.base, x)
        if own and not self._dropping:
            return self.add_update(None, x)
        # Layers of other libraries may keep their output for backward, or hand out a view of it.
        return self.add_update(self.base_layer(x), x, in_place=own and type(self.base_layer) is nn.Linear)

    def add_update(self, out: Tensor | None, x: Tensor, in_place: bool = False) -> Tensor:
        """``out + x·ΔWᵀ`` for x (..., n) and out (..., m), in the dtype of `out`; into `out` itself if `in_place`.

        Without `out` it is the base's output, which saves a temporary; the base must be float, and x not dropped.
        """
        dtype = compute_dtype(x, self.gralora_A.dtype)
        A, B = self.gralora_A, self.gralora_B
        if torch.compiler.is_compiling():
            assert out is not None
            out = add_blocks(out, self._dropped(x), A, B, self.scaling, dtype)
        else:
            weight = None if out is not None else self.base.float_weight()
            bias = None if out is not None else self.base_layer.bias
            out = AddBlocks.apply(out, in_place, self._dropped(x), weight, bias, A, B, self.scaling, dtype)
        if self.gralora_A_general is None:
            return out
        kept, A, B = self._dropped(x), self.gralora_A_general.weight, self.gralora_B_general.weight
        if torch.compiler.is_compiling():
            return out + (self.scaling * (kept.to(dtype) @ A.t().to(dtype) @ B.t().to(dtype))).to(out.dtype)
        return add_low_rank(out, kept, True, dtype, (self.scaling,), A, B)

    def _dropped(self, x: Tensor) -> Tensor:
        """Input of one part of the adapter: blocks and hybrid drop elements each on their own, as in PEFT."""
        return self.dropout(x.to(self.gralora_A.dtype)) if self._dropping else x

    @property
    def _dropping(self) -> bool:
        return self.training and isinstance(self.dropout, nn.Dropout)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW of shape (m, n), in the adapter's dtype."""
        A, B = block_factors(self.gralora_A, self.gralora_B)
        delta = (B @ A).transpose(1, 2).reshape(self.out_features, self.in_features)
        if self.gralora_A_general is not None:
            delta = delta + self.gralora_B_general.weight @ self.gralora_A_general.weight
        return delta * self.scaling

    @property
    def base(self) -> BaseWeight:
        base = linear_base(self.base_layer)
        assert base is not None
        return base

    # What models read off their linear layers.
    @property
    def in_features(self) -> int:
        return self.k * self.gralora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.k * self.gralora_B.shape[2]

    @property
    def weight(self) -> Tensor:
        """The base's weight, without the update."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def extra_repr(self) -> str:
        hybrid = f", hybrid_r={self.hybrid_r}" if self.hybrid_r else ""
        return f"{self.in_features} -> {self.out_features}, r={self.r}, k={self.k}, alpha={self.alpha}{hybrid}"


def _kaiming(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


# --- the transform --------------------------------------------------------------------------------------------------


def gralora_layers(model: nn.Module) -> dict[str, GraLoRALinear]:
    """The GraLoRA layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GraLoRALinear)}


def _adapted(model: nn.Module) -> dict[str, GraLoRALinear]:
    layers = gralora_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no GraLoRA layers; call apply_gralora(model, target_modules) first"
        )
    return layers


@dataclass
class _Before:
    """What `unload_gralora` puts back beside the base layers."""

    trainable: set[str]
    modules: dict[str, nn.Module] = field(default_factory=dict)


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

    Apply it before DDP, FSDP or `torch.compile` wrap the model. If anything is wrong, nothing has been changed.

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
    check_numbers(r, k, alpha, hybrid_r, dropout)
    check_fresh(model)
    saved = find_saved(model, modules_to_save)
    targets = find_targets(model, target_modules, saved)
    check_blocks(targets, r, k)
    return install(model, targets, saved, r=r, k=k, alpha=alpha, hybrid_r=hybrid_r, dropout=dropout)


def check_fresh(model: nn.Module) -> None:
    """Raises unless `model` is a module without adapters that nothing distributed wraps yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
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
    before = _Before({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    layers = {name: GraLoRALinear(base, **settings).train(base.training) for name, base in targets.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for name in saved:
        before.modules[name] = model.get_submodule(name)
        # A copy, so that what is tied to it (input embeddings to the output head) stays frozen.
        model.set_submodule(name, deepcopy(before.modules[name]).requires_grad_(True))
    model._before_gralora = before  # type: ignore[assignment]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info(
        "GraLoRA on %d layers: %s trainable parameters of %s (%.2f %%)",
        len(layers),
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
    )
    return model


def saved_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that are trained whole."""
    before = model.__dict__.get("_before_gralora")
    return [] if before is None else list(before.modules)


def unload_gralora(model: nn.Module) -> nn.Module:
    """Takes the adapters off: `model` is as it was before `apply_gralora`, bit for bit, and is returned.

    Raises:
        ValueError: the model has no GraLoRA layers.
    """
    layers = _adapted(model)
    for name in saved_modules(model):
        model.set_submodule(name, model.__dict__["_before_gralora"].modules[name])
    return _restore(model, layers)


@torch.no_grad()
def merge_gralora(model: nn.Module) -> nn.Module:
    """Folds every update into its base weight, leaves plain layers behind and returns `model`.

    Float weights become ``W0 + ΔW``, rounded once. 4-bit and 8-bit weights are dequantised, added to and quantised
    again with their own settings, which is not exact; that is said in one warning. Modules that were trained whole
    stay as trained. The weights are new tensors: what else holds the old ones keeps them.

    Raises:
        ValueError: the model has no GraLoRA layers, or a base weight that can't be written; nothing has been merged.
    """
    layers = _adapted(model)
    for name, layer in layers.items():
        if layer.base.kind == "opaque":
            raise ValueError(
                f"layer {name!r}: the weight of a {type(layer.base_layer).__name__} can't be merged into; merge into "
                "the float model that it was quantised from"
            )
    quantised = sum(layer.base.kind != "float" for layer in layers.values())
    if quantised:
        warnings.warn(
            f"{quantised} quantised layers are dequantised, merged and quantised again: their outputs change by the "
            "quantisation error. To merge exactly, load the adapter on the float model",
            stacklevel=2,
        )
    for layer in layers.values():
        _write(layer.base, layer.delta_weight())
    return _restore(model, layers)


def _write(base: BaseWeight, delta: Tensor) -> None:
    """Puts a new weight ``W0 + delta`` into the layer, stored as the old one was."""
    module, old = base.module, base.module.weight
    if base.kind == "float":
        new = (base.float_weight() + delta).to(old.dtype)
        module.weight = nn.Parameter(new.t().contiguous() if base.transposed else new, requires_grad=False)
        return
    import bitsandbytes.nn as bnb

    dense = base.dense(delta.dtype) + delta.to(old.device)
    quantised: Any
    if base.kind == "4bit":
        settings = {
            key: getattr(old, key) for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        quantised = bnb.Params4bit(dense.to(old.quant_state.dtype), requires_grad=False, module=module, **settings)
    else:
        quantised = bnb.Int8Params(dense.cpu(), requires_grad=False, has_fp16_weights=False)
        module.state.CB = module.state.SCB = None  # the old weight's; the next forward takes the new one's
    module.weight = quantised.to(old.device)  # quantises


def _restore(model: nn.Module, layers: dict[str, GraLoRALinear]) -> nn.Module:
    for name, layer in layers.items():
        release_layout(layer._held)
        model.set_submodule(name, layer.base_layer.train(layer.training))
    before = model.__dict__.pop("_before_gralora", None)
    trainable = set() if before is None else before.trainable
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return model
