"""Auxiliaries as the method sees them: A (r, n), B (m, r) and the scaling of their product, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import full_tensor
from ..layers.stack import chunks
from ..layers.tangent import product_sq
from ..layers.view import plain_name

__all__ = ["named_triples", "shapes_of", "total_norm"]

Triple = tuple[Tensor, Tensor, float]


def named_triples(model: nn.Module, triples: Sequence[Triple]) -> dict[str, Triple]:
    """Triples that a user made, by the names of their A in the model.

    Raises:
        ValueError: parameters of another model, or of shapes that do not multiply.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for i, triple in enumerate(triples):
        A, B, scaling = triple
        if id(A) not in names or id(B) not in names:
            raise ValueError(f"auxiliary[{i}]: A and B must be parameters of the model, which has neither or only one")
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"auxiliary[{i}]: A {tuple(A.shape)} and B {tuple(B.shape)} do not multiply; expected (r, n) and (m, r)"
            )
        found[plain_name(names[id(A)])] = (A, B, float(scaling))
    return found


def total_norm(triples: dict[str, Triple]) -> Tensor:
    """``sqrt(Σ ‖s·B·A‖_F²)``; nothing larger than r×r is formed per layer.

    Layers of one form are launched together, as many as have a bounded size: their products are too small to be worth
    a launch each.
    """
    alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for A, B, scaling in triples.values():
        a, b = full_tensor(A), full_tensor(B)
        alike.setdefault((scaling, a.shape, b.shape, a.dtype, b.dtype, a.device), []).append((a, b))
    squares = []
    for (scaling, *_), group in alike.items():
        first = group[0]
        for part in chunks(group, first[0].numel() + first[1].numel(), first[0].device):
            a, b = (torch.stack(same) for same in zip(*part, strict=True))
            squares.append(scaling**2 * product_sq(b, a))
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().clamp_(min=0.0).sqrt_()


_ALIKE = ("scaling", "ranks")  # of a checkpoint's layer and the model's, beside the shapes


def shapes_of(layers: Any) -> dict[str, Any]:
    """The shapes of A and B of a checkpoint's layers, their scaling, and the ranks of the adapters beside them."""
    try:
        return {
            name: {factor: tuple(layer[factor].shape) for factor in "AB"} | {key: layer[key] for key in _ALIKE}
            for name, layer in layers.items()
        }
    except (AttributeError, KeyError, TypeError) as reason:
        raise ValueError("the state_dict's Bi-LoRA part has no A, B, scaling and ranks for each layer") from reason
