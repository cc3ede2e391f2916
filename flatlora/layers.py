"""Finding adapted linear layers in any model, and one view of them all.

A layer's effective weight is ``W' = diag(a)·W0 + Σ_k s_k·diag(c_k)·B_k·A_k`` over its active adapters: `a` and `c` are
one for LoRA, and hold DoRA's row factors ``μ / ‖W0 + s·B·A‖`` where an adapter has a magnitude.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base_weight import BaseWeight, linear_base, whole

__all__ = ["Adapter", "LoRALayer", "lora_layers"]

logger = logging.getLogger("flatlora")

_WRAPPER_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What a LoRA layer of other libraries calls the layer it adapts, in the order they are looked for.
_BASE_NAMES = ("base_layer", "linear", "base", "original", "original_layer", "org_module")


def plain_name(name: str) -> str:
    """A module's name without the parts that DDP, FSDP, checkpointing or `torch.compile` put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def shared_seed() -> int:
    """Torch's initial seed, read without touching the stream; rank 0's on every rank."""
    seed = [torch.initial_seed()]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(seed)
    return seed[0]


@dataclass(frozen=True)
class Adapter:
    """One active low-rank adapter of a layer: it adds ``scaling · B·A`` to the weight.

    `A` is (r, n), `B` is (m, r); the parameters behind them may be stored the other way around. GraLoRA's are a grid of
    k×k blocks, `A` (k, k, r/k, n/k) and `B` (k, k, m/k, r/k), and add ``scaling · B_ij·A_ij`` to block row i, column j.
    `magnitude` is DoRA's (m,) vector or None. `dropout` acts on the adapter's input.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    dropout: nn.Module | None = None
    A_param: nn.Parameter | None = None
    B_param: nn.Parameter | None = None

    @property
    def has_grads(self) -> bool:
        return all(param is not None and param.grad is not None for param in (self.A_param, self.B_param))

    def grads(self) -> tuple[Tensor, Tensor]:
        """(∂L/∂A, ∂L/∂B) in the shapes of A and B; both must be there."""
        assert self.A_param is not None and self.B_param is not None
        assert self.A_param.grad is not None and self.B_param.grad is not None
        grad_a, grad_b = whole(self.A_param.grad), whole(self.B_param.grad)
        if self.A.dim() == 4:
            return block_factors(grad_a, grad_b)
        return (
            grad_a if grad_a.shape == self.A.shape else grad_a.t(),
            grad_b if grad_b.shape == self.B.shape else grad_b.t(),
        )

    @property
    def k(self) -> int:
        """Blocks along each side of the weight: 1 for all but GraLoRA."""
        return self.A.shape[0] if self.A.dim() == 4 else 1

    @property
    def rank(self) -> int:
        return self.A.shape[-2] * self.k

    def blocks(self, k: int) -> tuple[Tensor, Tensor]:
        """A (k, k, q, n/k) and B (k, k, m/k, q) of every block of a k×k grid; k is a multiple of the adapter's own."""
        A, B = (whole(factor)[(None,) * (4 - factor.dim())] for factor in (self.A, self.B))
        pieces = k // self.k
        if pieces == 1:
            return A, B
        A = A.unflatten(3, (pieces, -1)).movedim(3, 2).flatten(1, 2)
        B = B.unflatten(2, (pieces, -1)).movedim(2, 1).flatten(0, 1)
        return A.repeat_interleave(pieces, 0), B.repeat_interleave(pieces, 1)


def block_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """GraLoRA's factors block by block, as views: A (k, n/k, r) as (k, k, r/k, n/k), B (k, r, m/k) as (k, k, m/k, r/k).

    [i, j] is the block in block row i and block column j. Stored, A has one matrix per block column, whose r columns
    belong to the block rows in turn; B has one per block row, whose r rows belong to the block columns in turn.
    """
    k = A.shape[0]
    return A.unflatten(2, (k, -1)).permute(2, 0, 3, 1), B.unflatten(1, (k, -1)).transpose(2, 3)


class LoRALayer:
    """A linear layer with low-rank adapters. Holds the module and looks every tensor up when asked.

    Attributes:
        name: the module's name in the model, without the parts that DDP, FSDP or `torch.compile` add.
        module: the adapter layer itself.
        base: its frozen weight.
        shape: (m, n) = (out_features, in_features).
        names: the adapters that this view was asked for; `adapters()` yields all active ones.
        is_peft: whether the module is PEFT's.
    """

    def __init__(self, name: str, module: nn.Module, base: BaseWeight, names: frozenset[str]):
        self.name = name
        self.module: Any = module
        self.base = base
        self.names = names
        # A module's kind does not change, and asking it takes longer than the rest of `adapters()`.
        self._gralora = _is_gralora(module)
        self.is_peft = _is_peft(module) or _is_peft_gralora(module)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are folded into the base weight at present."""
        if self.is_peft:
            return tuple(self.module.merged_adapters)
        return ("default",) if getattr(self.module, "merged", False) else ()

    @property
    def active(self) -> bool:
        """Whether one of the adapters asked for takes part in the layer's output at present."""
        if not self.is_peft:
            return True
        if self.module.disable_adapters:
            return False
        return any(name in self.names for name in (*self.module.active_adapters, *self.merged))

    def all_adapters(self) -> list[Adapter]:
        """Every adapter asked for, active or not."""
        return [adapter for name in sorted(self.names) for adapter in self._adapters(name)]

    def adapters(self) -> list[Adapter]:
        """The adapters that the layer adds to its base weight at present; none while they are merged or disabled."""
        if self.merged or (self.is_peft and self.module.disable_adapters):
            return []
        names = self.module.active_adapters if self.is_peft else ["default"]
        return [adapter for name in names for adapter in self._adapters(name)]

    def _adapters(self, name: str) -> list[Adapter]:
        module: Any = self.module
        if self._gralora:
            return _gralora_adapters(module, name)
        if not self.is_peft:
            return [_plain_adapter(module, self.shape)]
        factors, magnitudes = module.lora_A, module.lora_magnitude_vector
        if name not in factors:
            return []
        magnitude = magnitudes[name].weight if name in magnitudes else None
        A, B = factors[name].weight, module.lora_B[name].weight
        return [Adapter(name, A, B, module.scaling[name], magnitude, module.lora_dropout[name], A, B)]

    def __repr__(self) -> str:
        m, n = self.shape
        return f"LoRALayer({self.name!r}, {n} -> {m}, {self.base.kind} base, adapters {sorted(self.names)})"


def lora_layers(model: nn.Module, adapter: str | Iterable[str] | None = None) -> list[LoRALayer]:
    """Finds every adapted linear layer of a model.

    Understood are PEFT's LoRA, rsLoRA and DoRA layers over `nn.Linear`, `Conv1D` and bitsandbytes' `Linear4bit` and
    `Linear8bitLt`, GraLoRA layers, this library's and PEFT's, and any other module that holds `lora_A` and `lora_B`
    (2-D parameters or `nn.Linear` modules) beside a linear base: its own `weight`, or a child named `base_layer`,
    `linear`, `base` or `original`. Such a module must say its scaling, as `scaling` or as `alpha` (`lora_alpha`) and
    `r` (`rank`).

    Adapters of other kinds (embeddings, convolutions, experts, token-dependent variants) are not linear layers with
    one weight update; they are left out and named once in a log line.

    Args:
        model: any module, also one wrapped by DDP, FSDP or `torch.compile`.
        adapter: name or names of the adapters to look at; None for all.

    Raises:
        ValueError: no adapted linear layer, an adapter name the model does not have, a module without a scaling.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = None if adapter is None else {adapter} if isinstance(adapter, str) else set(adapter)
    found: list[LoRALayer] = []
    skipped: list[str] = []
    known: set[str] = set()
    for raw_name, module in model.named_modules():
        name = plain_name(raw_name)
        if _is_peft(module):
            available = {*module.lora_A, *module.lora_embedding_A}
            base = _peft_base(module)
        elif _is_gralora(module):
            available = set(module.gralora_A) if _is_peft_gralora(module) else {"default"}
            base = linear_base(module.base_layer)
        elif _is_plain(module):
            available, base = {"default"}, _plain_base(module)
        else:
            continue
        known |= available
        names = available if wanted is None else available & wanted
        if not names:
            continue
        if base is None:
            skipped.append(name)
            continue
        if getattr(getattr(base.module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"layer {name!r}: bitsandbytes has repacked its 4-bit weight for CPU inference, in a forward in eval "
                "mode, and it can't be trained any more; load the model again, and build the optimizer before the "
                "first evaluation"
            )
        layer = LoRALayer(name, module, base, frozenset(names))
        layer.all_adapters()  # fails here, not in the first step, where a plain layer's form is not understood
        found.append(layer)
    if wanted is not None and not wanted <= known:
        raise ValueError(f"unknown adapter {sorted(wanted - known)}; the model has {sorted(known) or 'no adapters'}")
    if not found:
        others = f" (adapters that are not linear layers: {_some(skipped)})" if skipped else ""
        raise ValueError(
            f"{type(model).__name__} has no adapted linear layer{others}; add adapters first, for example with "
            "peft.get_peft_model(model, LoraConfig(target_modules='all-linear'))"
        )
    if skipped:
        _tell_once(f"left alone, as their adapters are not linear layers: {_some(skipped)}")
    return found


@functools.cache
def _tell_once(message: str) -> None:
    logger.warning(message)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- PEFT ---------------------------------------------------------------------------------------------------------


def _is_peft(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _peft_base(module: Any) -> BaseWeight | None:
    """The base weight of a PEFT layer whose active form is LoRA or DoRA on a linear layer, else None."""
    base = module.get_base_layer()
    names = list(module.lora_A)
    variants = [module.lora_variant[name] for name in names if name in getattr(module, "lora_variant", {})]
    if not names or any(type(variant).__name__ != "DoraLinearVariant" for variant in variants):
        return None
    if not all(type(module.lora_A[name]).__name__ == "Linear" for name in names):
        return None  # convolutions
    m, n = module.lora_B[names[0]].weight.shape[0], module.lora_A[names[0]].weight.shape[1]
    if type(base).__name__ in ("MultiheadAttention", "NonDynamicallyQuantizableLinear") or not callable(base):
        return None
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() != 2:
        return None
    return BaseWeight(base, (m, n), transposed=bool(getattr(module, "fan_in_fan_out", False)))


# --- GraLoRA, this library's and PEFT's -----------------------------------------------------------------------------


def _is_gralora(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and isinstance(getattr(module, "gralora_A", None), Tensor | nn.ParameterDict)


def _is_peft_gralora(module: nn.Module) -> bool:
    return _is_gralora(module) and isinstance(module.gralora_A, nn.ParameterDict)


def _gralora_adapters(module: Any, name: str) -> list[Adapter]:
    """The adapter made of blocks, and the plain one beside it where the layer is a hybrid."""
    parts: list[Any] = [getattr(module, f"gralora_{part}", None) for part in ("A", "B", "A_general", "B_general")]
    scaling = module.scaling
    if _is_peft_gralora(module):
        if name not in module.gralora_A:
            return []
        parts, scaling = [part[name] for part in parts], scaling[name]
    A, B, general_A, general_B = parts
    found = [Adapter(name, *block_factors(whole(A), whole(B)), scaling, A_param=A, B_param=B)]
    if hasattr(general_A, "weight"):
        A, B = general_A.weight, general_B.weight
        found.append(Adapter(name, A, B, scaling, A_param=A, B_param=B))
    return found


# --- modules of other libraries -----------------------------------------------------------------------------------


def _is_plain(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Parameter | nn.Linear) for name in ("lora_A", "lora_B"))


def _factor(value: Any) -> Any:
    return value.weight if isinstance(value, nn.Linear) else value


def _plain_base(module: Any) -> BaseWeight | None:
    children = [getattr(module, name, None) for name in _BASE_NAMES]
    base = next((child for child in children if isinstance(child, nn.Module)), module)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    in_features, out_features = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if in_features is None or out_features is None:
        if weight.dim() != 2 or type(weight).__name__ == "Params4bit":
            return None
        transposed = type(base).__name__ == "Conv1D"
        out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    else:
        transposed = weight.is_floating_point() and tuple(weight.shape) != (out_features, in_features)
    if isinstance(base, nn.modules.conv._ConvNd | nn.Embedding):
        return None
    return BaseWeight(base, (out_features, in_features), transposed)


def _plain_adapter(module: Any, shape: tuple[int, int]) -> Adapter:
    m, n = shape
    A_param, B_param = _factor(module.lora_A), _factor(module.lora_B)
    A = A_param if A_param.shape[-1] == n else A_param.t()
    B = B_param if B_param.shape[0] == m else B_param.t()
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != n or B.shape[0] != m or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"{type(module).__name__}: lora_A {tuple(A_param.shape)} and lora_B {tuple(B_param.shape)} do not make an "
            f"update of the base weight's shape {shape}; expected (r, {n}) and ({m}, r)"
        )
    return Adapter("default", A, B, _plain_scaling(module, A.shape[0]), None, None, A_param, B_param)


def _plain_scaling(module: Any, rank: int) -> float:
    scaling = getattr(module, "scaling", None)
    if isinstance(scaling, int | float):
        return float(scaling)
    alpha = getattr(module, "lora_alpha", getattr(module, "alpha", None))
    if isinstance(alpha, int | float):
        return alpha / rank
    raise ValueError(
        f"{type(module).__name__} holds lora_A and lora_B but does not say how they are scaled; give it a float "
        "attribute `scaling` (or `alpha`, for alpha / r)"
    )
