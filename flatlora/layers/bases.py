"""How each kind of base weight is recognised: a table.

To add a kind, derive a class from `BaseWeight` and put it into `BASES`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .base import BaseWeight, FloatBase, OpaqueBase
from .bnb import Bnb4bitBase, Bnb8bitBase
from .probe import at_hand, orientation

__all__ = ["BASES", "Known", "base_weight", "linear_base"]

# The first class that recognises a weight reads it.
BASES: tuple[type[BaseWeight], ...] = (Bnb4bitBase, Bnb8bitBase, FloatBase, OpaqueBase)

# A layer's forward, as FSDP derives classes of its own, and whether the layer multiplies by the weight that it stores.
Known = tuple[Any, bool]


def base_weight(
    module: Any, shape: tuple[int, int], transposed: bool = False, known: Known | None = None
) -> BaseWeight:
    """The (m, n) weight of a linear layer, by the class that reads what the layer stores at present.

    Stored floats are taken for the weight only where the layer is known to multiply by them: by its class, or as
    `known` says; others are asked once.
    """
    weight = getattr(module, "weight", None)
    kind = next(kind for kind in BASES if kind.reads(module, weight))
    if kind is FloatBase:
        assert weight is not None
        if known is not None and known[0] is type(module).forward:
            multiplies = known[1]
        elif _trusted(module, weight):
            multiplies = True
        else:
            found = orientation(module, weight)
            multiplies, transposed = found is not None, transposed if found is None else found
        kind = FloatBase if multiplies else OpaqueBase
    return kind(module, shape, transposed)


def _trusted(module: Any, weight: Any) -> bool:
    """Whether a layer's class tells what it does with its weight, and nobody has changed its forward.

    bitsandbytes' layers are trusted before they are quantised, when they can't be asked, and so are those of known
    classes whose values are elsewhere, as FSDP has forwards of its own.
    """
    if type(weight).__module__.startswith("bitsandbytes."):
        return True
    if not FloatBase(module, (0, 0), False).plain:
        return False
    return not ("forward" in module.__dict__ or module._forward_pre_hooks) or not at_hand(weight)


def linear_base(module: Any) -> BaseWeight | None:
    """The weight of an `nn.Linear`, one derived from it, or a `Conv1D`; None for any other module."""
    if type(module).__name__ == "Conv1D":
        n, m = module.weight.shape
        return base_weight(module, (m, n), transposed=True)
    # Attention reads the weight of the one left out and never calls it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    return base_weight(module, (module.out_features, module.in_features))
