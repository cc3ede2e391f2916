"""The two processes of a distributed test: what they run, and how they end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

RANKS = 2


def on_ranks(cases: Callable[[], dict[str, Callable[[int, str], Any]]], folder: Path) -> list[dict[str, Any]]:
    """What each of the processes reports of each case, called as ``case(rank, folder)``; if it fails, its ``error``.

    `cases` is a function of a module, which each process calls itself.
    """
    torch.multiprocessing.spawn(_worker, (cases, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _worker(rank: int, cases: Callable[[], dict[str, Callable[[int, str], Any]]], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(minutes=5)
    )
    found = {}
    for name, case in cases().items():
        try:
            found[name] = case(rank, folder)
        except Exception:  # of one case; the others are still told of
            found[name] = {"error": traceback.format_exc()}
    torch.save(found, f"{folder}/{rank}.pt")
    leave_together()


def leave_together() -> None:
    """Waits for every rank and ends the process at once.

    Taking gloo down under DDP's reducer can wait for ever on a rank that has gone already.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
