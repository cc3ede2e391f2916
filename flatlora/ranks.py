"""The processes that train together."""

from __future__ import annotations

import torch
from torch import Tensor


def world_size() -> int:
    """How many there are: one where no process group was made."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over all processes, each of which must ask for it; of one, the tensor itself."""
    if (size := world_size()) == 1:
        return tensor
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor)
    return tensor / size
