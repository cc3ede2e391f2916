"""The results file, one JSON line per run, and the processes that fill it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from common import quiet

from comparing.after import execute_all
from comparing.runs import Run, Task, load_task


class Store:
    """Results by configuration. A run is written as one line and is on the disk before `add` returns.

    A last line that a killed process left torn is dropped; any other line that is no result is an error.

    Args:
        path: the file; it is made where there is none.
        read_only: leave the file as it is; another process may be writing to it.

    Raises:
        SystemExit: a broken file, or one to write to that another process is writing to.
    """

    def __init__(self, path: Path, read_only: bool = False):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("rb" if read_only and path.exists() else "a+b")
        if not read_only:
            self._lock(path)
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if not read_only:
            self._file.truncate(len(whole))
        self.results: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                entry["run"].pop("quantise", None)  # of the first files: scores of rounded weights beside the others
                self.results[Run(**entry["run"]).key] = entry["result"]
            except (ValueError, KeyError, TypeError) as reason:
                raise SystemExit(f"error: {path}, line {number} is not a result: {reason!r}") from reason

    def _lock(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two at a time would repeat each other's runs
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as reason:
            raise SystemExit(f"error: {path} is being written by another process; wait for it to end") from reason

    def __contains__(self, run: Run) -> bool:
        return run.key in self.results

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self.results[run.key]

    def add(self, run: Run, result: dict[str, Any]) -> None:
        self._file.write(json.dumps({"run": asdict(run), "result": result}).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[run.key] = json.loads(json.dumps(result))

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


# --- processes ------------------------------------------------------------------------------------------------------


def results_of(runs: list[Run], args: argparse.Namespace) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Makes the runs, in `args.processes` processes of one thread each, and yields each when it is done.

    Runs that measure one and the same trained model are made together.
    """
    groups: dict[Run, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.training, []).append(run)
    if args.processes == 1:
        torch.set_num_threads(1)
        task = load_task(args)
        for group in groups.values():
            yield from zip(group, execute_all(group, task), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(groups.values()))
    workers: dict[Connection, list[Run]] = {}
    for _ in range(min(args.processes, len(waiting))):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, args), daemon=True).start()
        theirs.close()
        workers[ours] = []
    while workers:
        for pipe in list(workers):
            if not workers[pipe] and waiting:
                workers[pipe] = waiting.pop()
                pipe.send(workers[pipe])
            elif not workers[pipe]:
                pipe.close()
                del workers[pipe]
        for pipe in wait(list(workers)) if workers else ():  # without any it would wait for ever
            assert isinstance(pipe, Connection)
            group, workers[pipe] = workers[pipe], []
            yield from zip(group, received(pipe, group[0]), strict=True)


def received(pipe: Connection, run: Run) -> list[dict[str, Any]]:
    try:
        answer = pipe.recv()
    except EOFError:
        raise SystemExit(f"error: the process of the run {run.key} was killed") from None
    if isinstance(answer, str):
        raise SystemExit(f"error: the run {run.key} failed:\n{answer}")
    return answer


def work(pipe: Connection, args: argparse.Namespace) -> None:
    """A process: makes the runs it is sent until the pipe is closed, by the parent or by its end."""
    quiet()
    torch.set_num_threads(1)
    task: Task | None = None
    while True:
        try:
            group = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            task = load_task(args) if task is None else task
            answer: Any = execute_all(group, task)
        except (Exception, SystemExit):  # whatever it is, the parent tells the user
            answer = traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:
            return
