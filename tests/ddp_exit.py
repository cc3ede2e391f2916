"""How worker processes of the distributed tests end."""

import os
import sys

import torch


def leave_together():
    """Waits for every rank and ends the process at once.

    Taking gloo down under DDP's reducer can wait for ever on a rank that has gone already.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
