"""Time, peak memory and operators of training steps, on a CPU or a CUDA device."""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .contenders import Step, start
from .models import base_model, geometry

Args = argparse.Namespace
MB = 2**20
# What a fresh process has imported already, where it is forked from a server that does nothing else.
LIBRARIES = ["transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2", "peft", "flatlora"]


def token_ids(args: Args) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, geometry(args)[5], (1, args.tokens), generator=generator).to(args.device)


# --- time -----------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], Any], device: str) -> float:
    """How long a step takes; on CUDA between two events on its stream, waiting for work that was queued before."""
    if device == "cpu":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000  # it is in milliseconds


def interleaved(names: list[str], args: Args) -> tuple[dict[str, list[float]], dict[str, tuple[int, int]]]:
    """Seconds of each contender's steps, in rounds whose order rotates, and the `operators` of one step of each."""
    base, ids = base_model(args), token_ids(args)
    steps = {name: start(name, base, args) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(args.rounds + args.warm_up):
        for i in range(len(names)):
            name = names[(round_ + i) % len(names)]
            taken = seconds(lambda name=name: steps[name](ids), args.device)
            if round_ >= args.warm_up:
                times[name].append(taken)
    # A mode that watches operators can't look into compiled code.
    counts = {} if args.compile else {name: operators(step, ids) for name, step in steps.items()}
    return times, counts


def keep_freed_memory() -> None:
    """Has glibc serve large blocks from its heap, and never shrink it; elsewhere it changes nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


# --- operators ------------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts the operators that torch is asked for within it, views among them: each costs the host a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(step: Step, ids: torch.Tensor) -> tuple[int, int]:
    """How many operators forward and backward ask for, and how many the update does."""
    counts = []
    for part in (step.gradients, step.update):
        with Counting() as counting:
            part(ids)
        counts.append(counting.count)
    return counts[0], counts[1]


# --- memory ---------------------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, of which memory is left over from nobody; raises what it did."""
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(LIBRARIES)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        ok, value = receiver.recv()
    except EOFError:
        process.join()
        raise MemoryError(f"the process ended with exit code {process.exitcode}; was it killed for memory?") from None
    process.join()
    if not ok:
        raise RuntimeError(value)
    return value


def _send(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:  # the parent raises it
        sender.send((False, f"{type(error).__name__}: {error}"))


def peak_memory(name: str, args: Args) -> float:
    """The most that model and training step hold, in MB. For a fresh process.

    On CUDA it is what torch's allocator has given out. On the CPU it is the growth of the process's resident memory
    over what it has after its imports; what building the model takes beside it is left out where the system can.
    """
    torch.set_num_threads(args.threads)
    cuda = args.device != "cpu"
    before = 0.0 if cuda else resident("VmRSS")
    step, ids = start(name, base_model(args), args), token_ids(args)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    for _ in range(3):
        step(ids)
    return torch.cuda.max_memory_allocated() / MB if cuda else resident("VmHWM") - before


def resident(key: str) -> float:
    """This process's resident memory in MB: at present (VmRSS), or at its highest (VmHWM)."""
    if sys.platform == "linux":  # getrusage would hand on what the parent had at the fork
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status[key].split()[0]) / 1024
    if key == "VmRSS":
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB


def forget_peak() -> None:
    """Has the highest resident memory counted from now on; changes nothing where Linux's ``clear_refs`` is not."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
