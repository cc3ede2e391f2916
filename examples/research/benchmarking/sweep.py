"""The sweep: one size at a time around a middle, as ratios of time and memory to plain LoRA, with their spread."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .measuring import Args, in_fresh_process, interleaved, keep_freed_memory, peak_memory
from .models import SWEEP_VOCABULARY

METHODS = ["PEFT LoRA", "GGPO gaussian", "GGPO low_rank", "Bi-LoRA", "LoRASAM", "GraLoRA"]
MIDDLE = {"width": 1024, "tokens": 512, "r": 16, "layers": 2}
AXES = {
    "width": [256, 512, 1024, 2048, 4096],
    "tokens": [64, 256, 512, 1024, 2048, 4096, 8192],
    "r": [4, 16, 64, 256],
    "layers": [1, 2, 4, 8],
}
QUICK_MIDDLE = {"width": 256, "tokens": 128, "r": 16, "layers": 2}
QUICK_AXES = {"width": [128, 256, 512], "tokens": [64, 128, 256], "r": [4, 16, 64], "layers": [1, 2, 4]}


def cells(args: Args) -> Iterator[dict[str, Any]]:
    """Every size once, smallest first along each axis, with what else tells one measurement from another."""
    middle, axes = (QUICK_MIDDLE, QUICK_AXES) if args.quick else (MIDDLE, AXES)
    kind = f"{args.dtype}{' nf4' if args.nf4 else ' int8' if args.int8 else ''}"
    seen = []
    for axis, values in axes.items():
        for value in values:
            if (sizes := {**middle, axis: value}) not in seen:
                seen.append(sizes)
                yield {**sizes, "base": kind, "device": args.device, "threads": args.threads, "compile": args.compile}


def flops_per_second(args: Args) -> float:
    """What a large matrix product reaches here."""
    x = torch.randn(1024, 1024, device=args.device, dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        (x @ x).sum().item()
        best = max(best, 2 * 1024**3 / (time.perf_counter() - begin))
    return best


def estimate(cell: dict[str, Any], args: Args, flops: float) -> tuple[float, float]:
    """(minutes, GB) that a cell takes: four operations per weight and token, and what the backward pass keeps."""
    width, tokens, layers = cell["width"], cell["tokens"], cell["layers"]
    weights, head = layers * 13 * width**2, SWEEP_VOCABULARY * width
    attention = layers * 6 * tokens**2 * width
    steps = len(args.methods) * (args.rounds + args.warm_up + (0 if args.no_memory else 3))
    step = (4 * (weights + head) * tokens + attention) / flops + 1e-8 * weights  # and drawing the noise, twice
    kept = tokens * (layers * 40 * width + 4 * SWEEP_VOCABULARY)
    return steps * step / 60, 4 * (weights + head + kept) / 2**30


def measure(args: Args) -> tuple[dict[str, list[float]], dict[str, tuple[int, int]]]:
    """Times of one cell. For a fresh process, as how memory lies depends on what came before."""
    torch.set_num_threads(args.threads)
    if args.malloc == "keep":
        keep_freed_memory()
    return interleaved(args.methods, args)


def run(args: Args) -> None:
    """Measures what the file lacks and could be done in time, and makes the table and the picture of all it has."""
    known = load(args.sweep)
    flops = flops_per_second(args)
    args.methods = ["PEFT LoRA", *(name for name in args.methods if name != "PEFT LoRA")]
    for cell in cells(args):
        if any(all(entry[key] == cell[key] for key in cell) for entry in known):
            continue
        minutes, gigabytes = estimate(cell, args, flops)
        print(f"{_name(cell)}: about {minutes:.1f} min, {gigabytes:.1f} GB", end="", flush=True)
        if minutes > args.most_minutes or gigabytes > 0.8 * memory_at_hand(args):
            print(" - skipped, too large for --most-minutes or the memory there is")
            continue
        try:
            entry = {**cell, **_measured(cell, args)}
        except (MemoryError, RuntimeError) as error:  # of one size, as where memory runs out; the others are measured
            print(f" - failed: {error}")
            continue
        with args.sweep.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        known.append(entry)
        print(f" - {entry['seconds']['PEFT LoRA']:.3f} s a step")
    print(table(known))
    draw(known, args.sweep.with_suffix(".png"), QUICK_MIDDLE if args.quick else MIDDLE)


def _measured(cell: dict[str, Any], args: Args) -> dict[str, Any]:
    own = argparse.Namespace(**{**vars(args), **{key: cell[key] for key in MIDDLE}})
    times, counts = in_fresh_process(measure, own)
    first = times["PEFT LoRA"]
    ratios = {name: [t / b for t, b in zip(values, first, strict=True)] for name, values in times.items()}
    found = {"seconds": {name: statistics.median(values) for name, values in times.items()}, "operators": counts}
    found["time"] = {name: [statistics.median(values), *_quartiles(values)] for name, values in ratios.items()}
    if not args.no_memory:
        peaks = {name: in_fresh_process(peak_memory, name, copy.copy(own)) for name in times}
        found["megabytes"] = peaks
        found["memory"] = {name: peak / peaks["PEFT LoRA"] for name, peak in peaks.items()}
    return found


def memory_at_hand(args: Args) -> float:
    """GB that are free."""
    if args.device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def load(path: Path) -> list[dict[str, Any]]:
    """The results in a file; one that an interrupted run left torn is dropped from it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['base']:9s} width {cell['width']:4d}, {cell['tokens']:4d} tokens, r = {cell['r']:3d}, " + (
        f"{cell['layers']} layers"
    )


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row per size, a column per method with time (quartiles) and memory as ratios to PEFT's LoRA."""
    names = [name for name in METHODS[1:] if any(name in entry["time"] for entry in entries)]
    names += sorted({name for entry in entries for name in entry["time"]} - {*names, METHODS[0]})
    lines = [
        "| base, size | PEFT LoRA | " + " | ".join(names) + " |",
        "| --- " * (len(names) + 2) + "|",
    ]
    for entry in entries:
        shown = [f"{entry['seconds']['PEFT LoRA']:.3f} s"]
        for name in names:
            time_, low, high = entry["time"].get(name, [float("nan")] * 3)
            memory = f", memory {entry['memory'][name]:.2f}" if name in entry.get("memory", {}) else ""
            shown.append(f"{time_:.2f} ({low:.2f} to {high:.2f}){memory}")
        lines.append(f"| {_name(entry)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(entries: list[dict[str, Any]], path: Path, middle: dict[str, int]) -> None:
    """A panel per axis for time and one for memory; a colour per method, a style of line per base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(middle), figsize=(16, 7), sharey="row", squeeze=False)
    kinds = sorted({entry["base"] for entry in entries})
    names = [name for name in entries[0]["time"] if name != "PEFT LoRA"] if entries else []
    for column, axis in enumerate(middle):
        on_axis = [e for e in entries if all(e[key] == middle[key] for key in middle if key != axis)]
        sizes = sorted({e[axis] for e in on_axis})
        for kind, style in zip(kinds, ("-", "--", ":", "-.") * len(kinds), strict=False):
            chosen = sorted((e for e in on_axis if e["base"] == kind), key=lambda e: e[axis])
            for colour, name in enumerate(names):
                for row, key in enumerate(("time", "memory")):
                    of = [e for e in chosen if name in e.get(key, {})]
                    values = [e[key][name] for e in of]
                    x = [e[axis] for e in of]
                    if key == "time":
                        panels[row][column].fill_between(
                            x, [v[1] for v in values], [v[2] for v in values], color=f"C{colour}", alpha=0.15
                        )
                        values = [v[0] for v in values]
                    panels[row][column].plot(x, values, style, color=f"C{colour}", marker=".", label=f"{name}, {kind}")
        for row, key in enumerate(("step time", "peak memory")):
            panels[row][column].axhline(1.0, color="black", linewidth=0.8)
            panels[row][column].set(xscale="log", xlabel=axis, ylabel=f"{key} / PEFT LoRA" if column == 0 else "")
            panels[row][column].set_xticks(sizes, sizes)
            panels[row][column].minorticks_off()
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
