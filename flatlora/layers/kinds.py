"""How each kind of adapter layer, and of base weight, is recognised and read: two tables.

To add a kind of adapter, write a `Reader` and put it into `READERS`. To add a kind of base, derive a class from
`BaseWeight` and put it into `BASES`. The first entry that recognises a module reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .adapter import Adapter, block_factors
from .base import BaseWeight, FloatBase, OpaqueBase, whole
from .bnb import Bnb4bitBase, Bnb8bitBase

__all__ = ["BASES", "READERS", "Reader", "base_weight", "linear_base", "reader_of"]


# --- base weights -------------------------------------------------------------------------------------------------


BASES: tuple[type[BaseWeight], ...] = (Bnb4bitBase, Bnb8bitBase, FloatBase, OpaqueBase)


def base_weight(module: Any, shape: tuple[int, int], transposed: bool = False) -> BaseWeight:
    """The (m, n) weight of a linear layer, by the class that reads what the layer stores at present."""
    weight = getattr(module, "weight", None)
    return next(kind for kind in BASES if kind.reads(module, weight))(module, shape, transposed)


def linear_base(module: Any) -> BaseWeight | None:
    """The weight of an `nn.Linear`, one derived from it, or a `Conv1D`; None for any other module."""
    if type(module).__name__ == "Conv1D":
        n, m = module.weight.shape
        return base_weight(module, (m, n), transposed=True)
    # Attention reads the weight of the one left out and never calls it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    return base_weight(module, (module.out_features, module.in_features))


# --- adapters -----------------------------------------------------------------------------------------------------


class Reader(ABC):
    """Reads one kind of adapter layer. It keeps nothing: every question is about the module as it is at present."""

    is_peft = False

    @abstractmethod
    def reads(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""

    @abstractmethod
    def names(self, module: Any) -> Iterable[str]:
        """The adapters that the module holds."""

    @abstractmethod
    def base(self, module: Any) -> BaseWeight | None:
        """The weight that they adapt; None where they are not low-rank updates of a linear layer's weight."""

    @abstractmethod
    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        """What the adapter of that name consists of, for a base weight (m, n); nothing if there is none here."""

    def enabled(self, module: Any) -> bool:
        """Whether the module adds its adapters at all."""
        return True

    def active(self, module: Any) -> Sequence[str]:
        """Names of the adapters that the module adds while it is enabled and they are not merged."""
        return ("default",)

    def merged(self, module: Any) -> Sequence[str]:
        """Names of the adapters that are folded into the base weight."""
        return ()


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

    def base(self, module: Any) -> BaseWeight | None:
        if hasattr(module, "parameter_name"):
            return None  # PEFT's target_parameters: one parameter, such as all experts' weights, and no linear layer
        base, names = module.get_base_layer(), list(module.lora_A)
        variants = [module.lora_variant[name] for name in names if name in getattr(module, "lora_variant", {})]
        if not names or any(type(variant).__name__ != "DoraLinearVariant" for variant in variants):
            return None
        if not all(type(module.lora_A[name]).__name__ == "Linear" for name in names):
            return None  # convolutions
        if isinstance(base, nn.MultiheadAttention | NonDynamicallyQuantizableLinear) or not callable(base):
            return None
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() != 2:
            return None
        A, B = (_present(factors[names[0]].weight) for factors in (module.lora_A, module.lora_B))
        m, n = B.shape[0], A.shape[1]
        return base_weight(base, (m, n), bool(getattr(module, "fan_in_fan_out", False)))

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        factors, magnitudes = module.lora_A, module.lora_magnitude_vector
        if name not in factors:
            return []
        magnitude = magnitudes[name].weight if name in magnitudes else None
        A, B = _present(factors[name].weight), _present(module.lora_B[name].weight)
        return [Adapter(name, A, B, module.scaling[name], magnitude, module.lora_dropout[name], A, B)]


class PeftGraLoRA(_Peft):
    """PEFT's GraLoRA: a grid of blocks, and beside it, in a hybrid, a plain adapter."""

    def reads(self, module: nn.Module) -> bool:
        return hasattr(module, "base_layer") and isinstance(getattr(module, "gralora_A", None), nn.ParameterDict)

    def names(self, module: Any) -> Iterable[str]:
        return module.gralora_A

    def base(self, module: Any) -> BaseWeight | None:
        return linear_base(module.base_layer)

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        if name not in module.gralora_A:
            return []
        general = module.gralora_A_general[name], module.gralora_B_general[name]
        return _blocks(name, module.gralora_A[name], module.gralora_B[name], *general, module.scaling[name])


class OwnGraLoRA(Reader):
    """`GraLoRALinear`, of which there is one to a layer."""

    def reads(self, module: nn.Module) -> bool:
        return hasattr(module, "base_layer") and isinstance(getattr(module, "gralora_A", None), Tensor)

    def names(self, module: Any) -> Iterable[str]:
        return ("default",)

    def base(self, module: Any) -> BaseWeight | None:
        return linear_base(module.base_layer)

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        general = module.gralora_A_general, module.gralora_B_general
        return _blocks(name, module.gralora_A, module.gralora_B, *general, module.scaling)


def _present(factor: Any) -> Any:
    """The factor; ValueError where others keep its values and leave it empty."""
    if factor.numel() == 0:
        raise ValueError(
            "an adapter's parameter is empty: FullyShardedDataParallel (FSDP1) or DeepSpeed's ZeRO stage 3 shards it "
            "and hands it to its own layer alone. Use FSDP2 (torch's fully_shard, or fsdp_version: 2 in Accelerate's "
            "settings) or ZeRO stage 0"
        )
    return factor


def _blocks(name: str, A: Any, B: Any, general_A: Any, general_B: Any, scaling: float) -> list[Adapter]:
    factors = block_factors(whole(_present(A)), whole(_present(B)))
    found = [Adapter(name, *factors, scaling, A_param=A, B_param=B)]
    if hasattr(general_A, "weight"):
        A, B = general_A.weight, general_B.weight
        found.append(Adapter(name, A, B, scaling, A_param=A, B_param=B))
    return found


class PlainLoRA(Reader):
    """Modules of other libraries that hold one `lora_A` and `lora_B`, as parameters or `nn.Linear` modules."""

    # What they call the layer they adapt, in the order it is looked for.
    base_names = ("base_layer", "linear", "base", "original", "original_layer", "org_module")

    def reads(self, module: nn.Module) -> bool:
        return all(isinstance(getattr(module, name, None), nn.Parameter | nn.Linear) for name in ("lora_A", "lora_B"))

    def names(self, module: Any) -> Iterable[str]:
        return ("default",)

    def base(self, module: Any) -> BaseWeight | None:
        children = [getattr(module, name, None) for name in self.base_names]
        base: Any = next((child for child in children if isinstance(child, nn.Module)), module)
        weight = getattr(base, "weight", None)
        if isinstance(base, _ConvNd | nn.Embedding):
            return None
        m, n = getattr(base, "out_features", None), getattr(base, "in_features", None)
        if m is None or n is None:
            if not isinstance(weight, Tensor) or weight.dim() != 2 or Bnb4bitBase.reads(base, weight):
                return None  # it does not say its shape
            transposed = type(base).__name__ == "Conv1D"
            m, n = reversed(weight.shape) if transposed else weight.shape
        else:
            transposed = isinstance(weight, Tensor) and weight.is_floating_point() and tuple(weight.shape) != (m, n)
        found = base_weight(base, (m, n), transposed)
        # A layer that is its own base can't be asked without its adapter.
        return None if base is module and isinstance(found, OpaqueBase) else found

    def merged(self, module: Any) -> Sequence[str]:
        return ("default",) if getattr(module, "merged", False) else ()

    def adapters(self, module: Any, name: str, shape: tuple[int, int]) -> list[Adapter]:
        m, n = shape
        A_param, B_param = self._factor(module.lora_A), self._factor(module.lora_B)
        A = A_param if A_param.shape[-1] == n else A_param.t()
        B = B_param if B_param.shape[0] == m else B_param.t()
        if A.dim() != 2 or B.dim() != 2 or A.shape[1] != n or B.shape[0] != m or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{type(module).__name__}: lora_A {tuple(A_param.shape)} and lora_B {tuple(B_param.shape)} do not make "
                f"an update of the base weight's shape {shape}; expected (r, {n}) and ({m}, r)"
            )
        return [Adapter(name, A, B, self._scaling(module, A.shape[0]), None, None, A_param, B_param)]

    def _factor(self, value: Any) -> Any:
        return value.weight if isinstance(value, nn.Linear) else value

    def _scaling(self, module: Any, rank: int) -> float:
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


READERS: tuple[Reader, ...] = (PeftLoRA(), PeftGraLoRA(), OwnGraLoRA(), PlainLoRA())


def reader_of(module: nn.Module) -> Reader | None:
    """What reads an adapter layer; None for a module that is none."""
    return next((reader for reader in READERS if reader.reads(module)), None)
