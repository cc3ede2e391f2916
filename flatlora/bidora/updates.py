"""How far magnitudes and directions are from the pretrained weights, and whether they move together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.adapter import Adapter
from ..layers.base import wide
from ..layers.stack import BaseNorms
from ..layers.view import LoRALayer

__all__ = ["Updates", "correlation"]


class Updates:
    """The magnitudes and directions of DoRA adapters against the weights that they began at.

    Args:
        layers: the adapted layers; each adapter is looked at as if it were its layer's only one.
    """

    def __init__(self, layers: list[LoRALayer]):
        self._layers, self._norms = layers, BaseNorms()

    @torch.no_grad()
    def changes(self) -> Tensor:
        """ΔM and ΔD (2, adapters) of DoRA's Eq. 3-4 (arXiv:2402.09353), on the device.

        ΔM is the mean over the rows of ``|μ_i − ‖W0_i‖|``, ΔD that of ``1 − cos(V_i, W0_i)`` with ``V = W0 + s·B·A``.
        """
        adapters = [(layer, a) for layer in self._layers for a in layer.all_adapters() if a.magnitude is not None]
        found = [self._changes(layer, adapter) for layer, adapter in adapters]
        return torch.stack([pair.to(found[0].device) for pair in found], 1) if found else torch.zeros(2, 0)

    def metrics(self) -> dict[str, Tensor]:
        """``update_correlation`` over the adapters, if there are two."""
        changes = self.changes()
        return {"update_correlation": correlation(changes)} if changes.shape[1] > 1 else {}

    def _changes(self, layer: LoRALayer, adapter: Adapter) -> Tensor:
        # No (m, n) matrix is formed. ``1 − cos`` is taken as ``sin²/(1 + cos)``, where nothing cancels however small
        # ``d = s·B·A`` is: ``sin² = (‖W0_i‖²·‖d_i‖² − (W0_i·d_i)²) / (‖W0_i‖²·‖V_i‖²)``.
        assert adapter.magnitude is not None
        dtype = wide(layer.base.device)
        crossed = layer.base.apply_rows(adapter.A).to(dtype)  # W0·Aᵀ
        A, B, base_sq = adapter.A.to(dtype), adapter.scaling * adapter.B.to(dtype), self._norms.of(layer).to(dtype)
        cross, own_sq = (B * crossed).sum(1), (B * (B @ (A @ A.mT))).sum(1)
        norms_sq = (base_sq * (base_sq + 2 * cross + own_sq)).clamp(min=torch.finfo(dtype).tiny)
        sin_sq = (base_sq * own_sq - cross.square()).clamp(min=0.0) / norms_sq
        cos = (base_sq + cross) / norms_sq.sqrt()
        return torch.stack([(adapter.magnitude - base_sq.sqrt()).abs().mean(), (sin_sq / (1 + cos)).mean()])


def correlation(changes: Tensor) -> Tensor:
    """Pearson's r of the two rows of `changes`, on their device; 0 where one of them does not vary."""
    m, d = changes - changes.mean(1, keepdim=True)
    both = m.norm() * d.norm()
    return torch.where(both > 0, (m @ d) / both, 0.0)
