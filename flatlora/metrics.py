"""Reading an optimizer's metrics, for logging."""

from __future__ import annotations

from typing import Any

import torch

from .ranks import mean_over_ranks
from .wrapper import Method


def read_metrics(optimizer: Any, over_ranks: bool = False) -> dict[str, float]:
    """``optimizer.metrics()`` as numbers: the one place where the host waits for the device.

    Args:
        optimizer: one of flatlora's, also beneath wrappers that have it as `.optimizer` (Accelerate's). Empty for
            others.
        over_ranks: return the mean over all processes, which must ask at once.
    """
    while not isinstance(optimizer, Method) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = optimizer.metrics() if isinstance(optimizer, Method) else {}
    if not found:
        return {}
    # Some groups reduce on the device alone, and metrics get there with the first step.
    tensors = [*found.values(), *(p for group in optimizer.param_groups for p in group["params"])]
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    numbers = torch.stack([value.detach().to(device, torch.float32) for value in found.values()])
    return dict(zip(found, (mean_over_ranks(numbers) if over_ranks else numbers).tolist(), strict=True))
