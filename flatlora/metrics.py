"""Reading what optimizers tell of themselves, for whoever logs it."""

from __future__ import annotations

from typing import Any

import torch

from .wrapper import Method

__all__ = ["read_metrics"]


def read_metrics(optimizer: Any) -> dict[str, float]:
    """``optimizer.metrics()`` as numbers: the one place where the host waits for the device.

    Args:
        optimizer: one of flatlora's, also beneath wrappers that keep it as `optimizer`, as Accelerate's does. Empty for
            any other.
    """
    while not isinstance(optimizer, Method) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = optimizer.metrics() if isinstance(optimizer, Method) else {}
    if not found:
        return {}
    values = [value.detach().float() for value in found.values()]
    return dict(zip(found, torch.stack([value.to(values[0].device) for value in values]).tolist(), strict=True))
