"""Reading an optimizer's metrics, for logging."""

from __future__ import annotations

from typing import Any

import torch

from .wrapper import Method


def read_metrics(optimizer: Any, ranks: int = 1) -> dict[str, float]:
    """``optimizer.metrics()`` as numbers: the one place where the host waits for the device.

    Args:
        optimizer: one of flatlora's, also beneath wrappers that have it as `.optimizer` (Accelerate's). Empty for
            others.
        ranks: how many processes ask at once; the numbers are their mean.
    """
    while not isinstance(optimizer, Method) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = optimizer.metrics() if isinstance(optimizer, Method) else {}
    if not found:
        return {}
    device = next((value.device for value in found.values() if value.device.type != "cpu"), torch.device("cpu"))
    numbers = torch.stack([value.detach().to(device, torch.float32) for value in found.values()])
    if ranks > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(numbers)
        numbers /= ranks
    return dict(zip(found, numbers.tolist(), strict=True))
