"""Reading an optimizer's metrics, for logging."""

from __future__ import annotations

from typing import Any

import torch

from .wrapper import Method


def read_metrics(optimizer: Any) -> dict[str, float]:
    """``optimizer.metrics()`` as numbers: the one place where the host waits for the device.

    Args:
        optimizer: one of flatlora's, also beneath wrappers that have it as `.optimizer` (Accelerate's). Empty for
        others.
    """
    while not isinstance(optimizer, Method) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = optimizer.metrics() if isinstance(optimizer, Method) else {}
    if not found:
        return {}
    values = [value.detach().float() for value in found.values()]
    return dict(zip(found, torch.stack([value.to(values[0].device) for value in values]).tolist(), strict=True))
