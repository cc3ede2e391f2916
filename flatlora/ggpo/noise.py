"""Noise whose rows are scaled by the norms of a layer's weight rows and of their gradients, without forming either."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.draw import Draw
from ..layers.view import LoRALayer
from .rows import Batch, Rows, batches, projected_grad_sq, weight_sq

__all__ = ["RowNoise"]

logger = logging.getLogger("flatlora")


class RowNoise:
    """The noise of all layers: its σ, β and step, and the rows it is scaled by.

    `everywhere` perturbs layers in eval mode as well, for measuring.
    """

    def __init__(
        self,
        layers: list[LoRALayer],
        sigma: float,
        beta: float,
        kind: Literal["gaussian", "low_rank"],
        rank: int,
        seed: int,
        everywhere: bool = False,
    ):
        self.rows = {layer.name: Rows(layer) for layer in layers}
        self.sigma, self.beta, self.kind, self.rank, self.seed = sigma, beta, kind, rank, seed
        self.everywhere = everywhere
        self.step = 0
        self.on = True
        self.held: dict[str, Draw | None] | None = None  # given to layers instead of what would be drawn
        self._observed: list[tuple[Batch, Tensor]] = []
        self._warned = False

    def draw(self, layer: LoRALayer) -> Draw | None:
        if not self._perturbs(layer):
            return None
        if self.held is not None:
            return self.held.get(layer.name)
        return Draw(self.kind, self.std(self.rows[layer.name]), self._layer_seed(layer.name), self.rank)

    def _perturbs(self, layer: LoRALayer) -> bool:
        return self.on and self.sigma > 0 and layer.active and (self.everywhere or layer.module.training)

    def _layer_seed(self, name: str) -> int:
        # A function of (seed, step, layer) rather than a running stream: every micro-batch, every recomputation, every
        # rank and a resumed run get the same ε, and nothing but these numbers has to be kept.
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def std(self, rows: Rows) -> Tensor:
        """Standard deviations (m,) of a layer's rows; the first layer asked in a step has others computed with it."""
        if rows.cached is None or rows.cached[0] != self._key(rows):
            with _exact(rows.layer.base.device):
                self._compute_stds(rows)
        assert rows.cached is not None
        return rows.cached[1]

    def _key(self, rows: Rows) -> Any:
        """What the standard deviations follow from."""
        versions = [
            (
                a.name,
                a.scaling,
                a.A.device,
                a.A._version,
                a.B._version,
                a.magnitude is not None and a.magnitude._version,
            )
            for a in rows.layer.adapters()
        ]
        return self.step, self.sigma, self.beta, rows.layer.merged, versions

    def _compute_stds(self, asked: Rows) -> None:
        # Of the others those that will be asked themselves and cost no gathering: never a key of a sharded layer, whose
        # parameters are others within its own forward.
        device = asked.layer.base.device
        ready = [r for r in self.rows.values() if r is asked or (self._perturbs(r.layer) and r.at_hand(device))]
        keys = {rows.layer.name: self._key(rows) for rows in ready}
        stale = [rows for rows in ready if rows.cached is None or rows.cached[0] != keys[rows.layer.name]]
        for batch in batches(stale):
            row_sq, _ = weight_sq(batch)
            zero = torch.zeros_like(row_sq[0])
            grads = [zero if rows.grad_sq is None else rows.grad_sq.to(device) for rows in batch.rows]
            row_sq = row_sq + self.beta * torch.stack(grads)
            variance = row_sq.mul(self.sigma**2 / batch.rows[0].layer.shape[1])
            stds = variance.nan_to_num(0.0, posinf=0.0).clamp_(min=0.0).sqrt_()
            for rows, std in zip(batch.rows, stds, strict=True):
                rows.cached = keys[rows.layer.name], std

    def observe_gradients(self) -> None:
        """Notes the norms of the gradients at hand for the next step's noise."""
        with _exact(next(iter(self.rows.values())).layer.base.device):
            noted = [(batch, projected_grad_sq(batch)) for batch in batches(self.rows.values())]
        self._observed = [(batch, new) for batch, new in noted if new is not None]
        if not self._observed and not self._warned:
            logger.warning("step() found no adapter gradients: the noise goes on without a gradient term")
            self._warned = True

    @torch.no_grad()
    def next_step(self) -> None:
        """Goes on to the next ε, scaled by the gradients noted last unless any of them is not finite."""
        self.step += 1
        if not self._observed:
            return
        # Decided on the device: asking the host whether all is finite would stall it at every step.
        sums = [new.sum() for _, new in self._observed]
        finite = torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()
        for batch, new in self._observed:
            old = [
                torch.zeros_like(new[0]) if rows.grad_sq is None else rows.grad_sq.to(new.device) for rows in batch.rows
            ]
            for rows, kept in zip(batch.rows, torch.where(finite.to(new.device), new, torch.stack(old)), strict=True):
                rows.grad_sq = kept
        self._observed = []


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Out of inference mode, which leaves tensors unfit for autograd, and of autocast, which rounds products."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
