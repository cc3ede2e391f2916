"""How each kind of adapter layer is recognised and read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .adapter import Adapter, block_factors
from .base import BaseWeight, whole

# What a LoRA layer of other libraries calls the layer it adapts, in the order they are looked for.
_BASE_NAMES = ("base_layer", "linear", "base", "original", "original_layer", "org_module")


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
