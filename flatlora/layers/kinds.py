"""How each kind of adapter layer is recognised and read: a table.

To add a kind of adapter, write a `Reader` and put it into `READERS`. The first that recognises a module reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .adapter import Adapter, NotLinear, Reader, block_factors
from .base import BaseWeight, full_tensor
from .bases import base_weight, linear_base
from .plain import PlainLoRA


class _Peft(Reader):
    """What all of PEFT's layers have in common."""

    is_peft = True

    def enabled(self, module: Any) -> bool:
        return not module.disable_adapters

    def active(self, module: Any) -> Sequence[str]:
        return module.active_adapters

    def merged(self, module: Any) -> Sequence[str]:
        return module.merged_adapters


class PeftLoRA(_Peft):
    """PEFT's LoRA, rsLoRA and DoRA."""

    def reads(self, module: nn.Module) -> bool:
        return hasattr(module, "base_layer") and isinstance(getattr(module, "lora_A", None), nn.ModuleDict)

    def names(self, module: Any) -> Iterable[str]:
        return (*module.lora_A, *module.lora_embedding_A)

    def base(self, module: Any) -> BaseWeight:
        if hasattr(module, "parameter_name"):
            raise NotLinear("target_parameters: one parameter, such as all experts' weights, and no linear layer")
        variants = {name: kind for name in module.lora_A if (kind := _variant(module, name)) is not None}
        readable = [name for name in module.lora_A if name not in variants]
        if not readable or any(name in variants for name in module.active_adapters):
            raise NotLinear(f"PEFT's {', '.join(sorted(set(variants.values())))}" if variants else "embeddings")
        base = module.get_base_layer()
        weight = getattr(base, "weight", None)
        linear = all(type(module.lora_A[name]).__name__ == "Linear" for name in readable)  # and no convolution
        flat = not isinstance(weight, Tensor) or weight.dim() == 2
        attention = isinstance(base, nn.MultiheadAttention | NonDynamicallyQuantizableLinear)
        if not (linear and flat and callable(base)) or attention:
            raise NotLinear(f"over a {type(base).__name__}")
        A, B = (_present(factors[readable[0]].weight) for factors in (module.lora_A, module.lora_B))
        return base_weight(base, (B.shape[0], A.shape[1]), bool(getattr(module, "fan_in_fan_out", False)))

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        factors, magnitudes = module.lora_A, module.lora_magnitude_vector
        if name not in factors or _variant(module, name) is not None:
            return []
        magnitude = magnitudes[name].weight if name in magnitudes else None
        A, B = _present(factors[name].weight), _present(module.lora_B[name].weight)
        return [Adapter(name, A, B, module.scaling[name], magnitude, module.lora_dropout[name], A, B)]


def _variant(module: Any, name: str) -> str | None:
    """The class by which an adapter adds something else than ``s·B·A``, with or without DoRA's magnitude."""
    variant = getattr(module, "lora_variant", {}).get(name)
    kind = type(variant).__name__
    return None if variant is None or kind == "DoraLinearVariant" else kind


class PeftGraLoRA(_Peft):
    """PEFT's GraLoRA: a grid of blocks, and beside it, in a hybrid, a plain adapter."""

    def reads(self, module: nn.Module) -> bool:
        return hasattr(module, "base_layer") and isinstance(getattr(module, "gralora_A", None), nn.ParameterDict)

    def names(self, module: Any) -> Iterable[str]:
        return module.gralora_A

    def base(self, module: Any) -> BaseWeight:
        return _gralora_base(module)

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        if name not in module.gralora_A:
            return []
        general = module.gralora_A_general[name], module.gralora_B_general[name]
        return _blocks(name, module.gralora_A[name], module.gralora_B[name], *general, module.scaling[name])


class OwnGraLoRA(Reader):
    """`GraLoRALinear`, which holds one adapter."""

    def reads(self, module: nn.Module) -> bool:
        return hasattr(module, "base_layer") and isinstance(getattr(module, "gralora_A", None), Tensor)

    def base(self, module: Any) -> BaseWeight:
        return _gralora_base(module)

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        general = module.gralora_A_general, module.gralora_B_general
        return _blocks(name, module.gralora_A, module.gralora_B, *general, module.scaling)


def _gralora_base(module: Any) -> BaseWeight:
    found = linear_base(module.base_layer)
    if found is None:
        raise NotLinear(f"over a {type(module.base_layer).__name__}")
    return found


def _present(factor: Any) -> Any:
    """The factor; ValueError where it is empty, as its values are sharded."""
    if factor.numel() == 0:
        raise ValueError(
            "an adapter's parameter is empty: FullyShardedDataParallel (FSDP1) or DeepSpeed's ZeRO stage 3 shards it. "
            "Use FSDP2 (torch's fully_shard, or fsdp_version: 2 in Accelerate's settings) or ZeRO stage 0"
        )
    return factor


def _blocks(name: str, A: Any, B: Any, general_A: Any, general_B: Any, scaling: float) -> list[Adapter]:
    factors = block_factors(full_tensor(_present(A)), full_tensor(_present(B)))
    found = [Adapter(name, *factors, scaling, A_param=A, B_param=B)]
    if hasattr(general_A, "weight"):
        A, B = general_A.weight, general_B.weight
        found.append(Adapter(name, A, B, scaling, A_param=A, B_param=B))
    return found


READERS: tuple[Reader, ...] = (PeftLoRA(), PeftGraLoRA(), OwnGraLoRA(), PlainLoRA())


def reader_of(module: nn.Module) -> Reader | None:
    """The reader of an adapter layer; None for any other module."""
    return next((reader for reader in READERS if reader.reads(module)), None)
