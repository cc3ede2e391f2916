"""How each kind of base weight is recognised: a table.

To add a kind, derive a class from `BaseWeight` and put it into `BASES`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .base import BaseWeight, FloatBase, OpaqueBase
from .bnb import Bnb4bitBase, Bnb8bitBase
from .probe import orientation, readable

# The first class that recognises a weight reads it.
BASES: tuple[type[BaseWeight], ...] = (Bnb4bitBase, Bnb8bitBase, FloatBase, OpaqueBase)

# The forward of a layer's class, and whether it multiplies by the stored weight. FSDP changes the class afterwards.
Known = tuple[Any, bool]


def base_weight(
    module: Any, shape: tuple[int, int], transposed: bool = False, known: Known | None = None
) -> BaseWeight:
    """The (m, n) weight of a linear layer, as the layer stores it at present.

    Stored floats are the weight only if the layer multiplies by them. That is known by its class or from `known`;
    other layers are tried once.
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
    """Whether the layer multiplies by its weight, as far as its class says.

    bitsandbytes' layers can't be tried before they are quantised, nor any layer whose values are elsewhere (FSDP).
    """
    if type(weight).__module__.startswith("bitsandbytes."):
        return True
    if not FloatBase(module, (0, 0), False).plain:
        return False
    return not ("forward" in module.__dict__ or module._forward_pre_hooks) or not readable(weight)


def linear_base(module: Any) -> BaseWeight | None:
    """The weight of an `nn.Linear`, of a class derived from it, or of a `Conv1D`; None for any other module."""
    if type(module).__name__ == "Conv1D":
        n, m = module.weight.shape
        return base_weight(module, (m, n), transposed=True)
    # Attention reads the weight of a NonDynamicallyQuantizableLinear and never calls it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    return base_weight(module, (module.out_features, module.in_features))
