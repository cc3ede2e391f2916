"""Processes of tests: forked from one that has imported what they need, which takes longer than most of them do."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from helpers import RANKS

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
IMPORTED = ["methods", "accelerate", "torch.distributed.fsdp", "transformers.trainer"]  # by the process that forks


def context() -> Any:
    """Like the module `multiprocessing`. The process that forks is started once and inherits nothing but modules."""
    found = multiprocessing.get_context(START)
    if START == "forkserver":
        from multiprocessing import forkserver

        found.set_forkserver_preload(IMPORTED)
        with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
            forkserver.ensure_running()
    return found


def start_script(path: Path, *arguments: Any, files: tuple[str, str] = (os.devnull, os.devnull), **options: Any) -> Any:
    """Starts ``python path arguments``, which writes its output and its errors into two files.

    Options are the working directory, `cwd`, and variables of the environment beside those that are set.
    """
    cwd = options.pop("cwd", None) or os.getcwd()
    given = (str(path), list(map(str, arguments)), cwd, {**os.environ, **options}, files)
    process = context().Process(target=_script, args=given)
    process.start()
    return process


def run_script(path: Path, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `start_script`, to its end."""
    with TemporaryDirectory() as folder:
        files = (os.path.join(folder, "out"), os.path.join(folder, "err"))
        process = start_script(path, *arguments, files=files, **options)
        process.join()
        texts = (Path(file).read_text(encoding="utf-8") for file in files)
        return subprocess.CompletedProcess([str(path), *arguments], process.exitcode, *texts)


def _script(path: str, arguments: list[str], cwd: str, environment: dict[str, str], files: tuple[str, str]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [path, *arguments]
    sys.path[:0] = [os.path.dirname(path), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(path, run_name="__main__")


# --- the two processes of a distributed test ----------------------------------------------------------------------


def on_ranks(cases: Callable[[], dict[str, Callable[[int, str], Any]]], folder: Path) -> list[dict[str, Any]]:
    """What each of the processes reports of each case, called as ``case(rank, folder)``; if it fails, its ``error``.

    `cases` is a function of a module, which each process calls itself.
    """
    context()
    torch.multiprocessing.start_processes(_worker, (cases, str(folder)), nprocs=RANKS, start_method=START)
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
