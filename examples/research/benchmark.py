"""Step time, peak memory and operators of the methods and their rivals against PEFT's LoRA, interleaved in one process.

    python examples/research/benchmark.py  # SmolLM2-135M's geometry, 1,024 tokens, fp32, CPU
    python examples/research/benchmark.py --compare peers  # or gralora, bidora
    python examples/research/benchmark.py --methods "PEFT LoRA" "Bi-LoRA" --layers 8 --nf4
    python examples/research/benchmark.py --device cuda --model 7B --dtype bf16 --nf4 --tokens 4096
    python examples/research/benchmark.py --sweep sweep.jsonl --dtype bf16  # over width, tokens, rank and layers

Every round runs one training step of each contender, in an order that rotates; what is printed are ratios of medians to
the first contender, and how many operators a step asks torch for, forward and backward and then the update. Peak memory
is a fresh process's. Weights are random: neither time nor memory depends on them.

While steps are timed, glibc keeps the memory that is freed. By default it returns large blocks to the system and gets
them anew, zeroed page by page, which costs a step up to a second here, by chance one contender's and not another's;
--malloc default times that too.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path

import torch
from benchmarking import sweep
from benchmarking.contenders import CONTENDERS
from benchmarking.measuring import in_fresh_process, interleaved, keep_freed_memory, peak_memory
from benchmarking.models import DTYPES, GEOMETRIES, geometry

warnings.filterwarnings("ignore")

SETS = {
    "lora": ["PEFT LoRA", "GGPO gaussian", "GGPO low_rank", "Bi-LoRA", "LoRASAM", "PEFT two adapters", "two-pass SAM"],
    "gralora": ["PEFT LoRA", "PEFT GraLoRA", "GraLoRA"],
    "bidora": ["PEFT DoRA", "BiDoRA forward", "BiDoRA central"],
    "peers": [name for name in CONTENDERS if not name.startswith("BiDoRA")],
}
FLOAT_BASE = ("noise in place", "noise materialised")  # they write to the weights, or add to them in their dtype


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", choices=list(SETS), default="lora", help="default: %(default)s")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help=f"the first is 1.0; of: {', '.join(CONTENDERS)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(GEOMETRIES), default="135M", help="geometry (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="instead of the geometry's own")
    parser.add_argument("--width", type=int, help="instead of --model: a Llama of that width, 2 layers, and 8k words")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--r", type=int, help="rank (default: 16, for gralora 32)")
    parser.add_argument("--k", type=int, default=4, help="GraLoRA's blocks along each side (default: %(default)s)")
    parser.add_argument("--hybrid-r", type=int, default=0, help="rank of the LoRA beside GraLoRA's blocks")
    parser.add_argument("--noise-rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not timed (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the base (default: %(default)s)")
    quantised = parser.add_mutually_exclusive_group()
    quantised.add_argument("--nf4", action="store_true", help="a base in NF4, computed in --dtype")
    quantised.add_argument("--int8", action="store_true", help="a base in int8")
    parser.add_argument("--compile", action="store_true", help="torch.compile; operators are not counted then")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--malloc", choices=["keep", "default"], default="keep", help="default: %(default)s")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="measure sizes into FILE, going on where it stopped")
    parser.add_argument("--quick", action="store_true", help="a sweep of small sizes")
    parser.add_argument("--most-minutes", type=float, default=10, help="sizes that would take longer are skipped")
    args = parser.parse_args()
    args.r = args.r or (32 if args.compare == "gralora" else 16)
    args.threads = torch.get_num_threads()
    args.methods = args.methods or (sweep.METHODS if args.sweep else SETS[args.compare])
    if unknown := [name for name in args.methods if name not in CONTENDERS]:
        parser.error(f"unknown methods {unknown}; there are {list(CONTENDERS)}")
    if args.nf4 or args.int8:
        args.methods = [name for name in args.methods if name not in FLOAT_BASE]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return args


def described(args: argparse.Namespace) -> str:
    quant = " NF4" if args.nf4 else " int8" if args.int8 else ""
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    name = f"width {args.width}" if args.width else args.model
    return (
        f"{geometry(args)[2]} layers of {name}, {args.tokens} tokens, r = {args.r}, {args.dtype}{quant} base"
        f"{', compiled' if args.compile else ''}, {where}, medians of {args.rounds} interleaved steps"
    )


def main() -> None:
    args = parsed()
    if args.sweep:
        sweep.run(args)
        return
    names = args.methods
    memory = {} if args.no_memory else {name: in_fresh_process(peak_memory, name, args) for name in names}
    if args.malloc == "keep":
        keep_freed_memory()
    times, counts = interleaved(names, args)
    print(described(args))
    base = statistics.median(times[names[0]])
    for name in names:
        median = statistics.median(times[name])
        paired = statistics.median(t / b for t, b in zip(times[name], times[names[0]], strict=True))
        line = f"{name:18s} {median:8.4f} s   {median / base:5.3f} x   (paired {paired:5.3f} x)"
        if memory:
            line += f"   peak {memory[name]:6.0f} MB   {memory[name] / memory[names[0]]:5.3f} x"
        if counts:
            line += "   {:5d} + {:5d} operators".format(*counts[name])
        print(line)


if __name__ == "__main__":
    main()
