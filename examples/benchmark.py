"""Step time and peak memory of the methods against PEFT's adapters with AdamW, interleaved in one process.

    python examples/benchmark.py                      # SmolLM2-135M's geometry, 1,024 tokens
    python examples/benchmark.py --layers 8 --base nf4
    python examples/benchmark.py --compare gralora    # or bidora
    python examples/benchmark.py --methods "PEFT LoRA" "Bi-LoRA"

Every round runs one training step of each contender, in an order that rotates; what is printed are ratios of medians to
the first contender. Peak memory is a fresh process's. Weights are random: neither time nor memory depends on them.

While steps are timed, glibc keeps the memory that is freed. By default it returns large blocks to the system and gets
them anew, zeroed page by page, which costs a step up to a second here, by chance one contender's and not another's;
--malloc default times that too.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported, and peft imports it

import torch  # noqa: E402
from peft import GraloraConfig, LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import flatlora  # noqa: E402

warnings.filterwarnings("ignore")

SETS = {
    "lora": ["PEFT LoRA", "GGPO gaussian", "GGPO low_rank", "Bi-LoRA", "LoRASAM", "PEFT two adapters", "two-pass SAM"],
    "gralora": ["PEFT LoRA", "PEFT GraLoRA", "GraLoRA"],
    "bidora": ["PEFT DoRA", "BiDoRA forward", "BiDoRA central"],
}
Step = Callable[[torch.Tensor], None]


def smollm2(layers: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def quantise(model: nn.Module, kind: str) -> None:
    """Replaces every linear layer but the head by bitsandbytes' NF4 or int8 one."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or "lm_head" in name:
            continue
        new: nn.Module
        if kind == "nf4":
            new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        model.set_submodule(name, new.to("cpu"))


def add_adapters(name: str, model: LlamaForCausalLM, args: argparse.Namespace) -> nn.Module:
    """Adapters of equal rank and scaling on all linear layers but the head."""
    r, alpha, targets = args.r, 2 * args.r, "all-linear"
    if name == "GraLoRA":
        return flatlora.apply_gralora(model, targets, r=r, k=args.k, alpha=alpha, hybrid_r=args.hybrid_r)
    if name == "PEFT GraLoRA":
        config = GraloraConfig(r=r, gralora_k=args.k, alpha=alpha, hybrid_r=args.hybrid_r, target_modules=targets)
        return get_peft_model(model, config)
    adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, use_dora="DoRA" in name))
    if name == "PEFT two adapters":
        adapted.add_adapter("second", LoraConfig(r=8, lora_alpha=16, target_modules=targets))
        adapted.base_model.set_adapter(["default", "second"])
    return adapted


def build(name: str, args: argparse.Namespace) -> Step:
    """One training step of a contender, as a function of the token ids."""
    torch.manual_seed(0)
    model = smollm2(args.layers)
    if args.base in ("nf4", "int8"):
        quantise(model, args.base)
    elif args.base == "bf16":
        model.to(torch.bfloat16)
    adapted = add_adapters(name, model, args)
    if args.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    adapted.train()
    if name.startswith("BiDoRA"):
        return bidora_step(adapted, name.split()[1])

    params = [p for p in adapted.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if name == "two-pass SAM":
        optimizer = two_pass_sam(params)
    elif name == "Bi-LoRA":
        optimizer = flatlora.BiLoRAOptimizer.for_model(adapted, torch.optim.AdamW, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(params, lr=1e-4)
    if name.startswith("GGPO"):
        optimizer = flatlora.GGPOOptimizer(optimizer, adapted, noise=name.split()[1], noise_rank=args.noise_rank)
    elif name == "LoRASAM":
        optimizer = flatlora.LoRASAMOptimizer(optimizer, adapted)

    def step(ids: torch.Tensor) -> None:
        def closure() -> torch.Tensor:
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            return loss

        closure()
        if name == "two-pass SAM":
            optimizer.step(closure)
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


def two_pass_sam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SAM over AdamW from the package pytorch-optimizer."""
    try:
        from pytorch_optimizer import SAM
    except ImportError as error:
        raise SystemExit("'two-pass SAM' needs: pip install pytorch-optimizer (or name other --methods)") from error
    return SAM(params, torch.optim.AdamW, rho=0.05, lr=1e-4)


def bidora_step(model: nn.Module, difference: str) -> Step:
    """One iteration: a lower and an upper step. Both levels see the same number of tokens."""
    lower = torch.optim.AdamW(flatlora.direction_parameters(model), lr=1e-4)
    upper = torch.optim.AdamW(flatlora.magnitude_parameters(model), lr=1e-4)
    train, val = [{}], [{}]  # filled by the step
    optimizer = flatlora.BilevelOptimizer(lower, upper, model, train, val, difference=difference)

    def step(ids: torch.Tensor) -> None:
        train[0] = val[0] = {"input_ids": ids, "labels": ids}
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(name: str, args: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    step = build(name, args)
    ids = torch.randint(0, 49152, (1, args.tokens))
    for _ in range(3):
        step(ids)
    if sys.platform == "linux":  # getrusage would hand on what the parent had at the fork
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        queue.put(int(status["VmHWM"].split()[0]) / 1024)
    else:
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def keep_freed_memory() -> None:
    """Has glibc serve large blocks from its heap, and never shrink it; elsewhere it changes nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def time_steps(names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    steps = {name: build(name, args) for name in names}
    torch.manual_seed(1)
    ids = torch.randint(0, 49152, (1, args.tokens))
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(args.rounds + 2):
        for i in range(len(names)):
            name = names[(round_ + i) % len(names)]
            start = time.perf_counter()
            steps[name](ids)
            if round_ >= 2:  # the first steps warm caches up
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", choices=list(SETS), default="lora", help="default: %(default)s")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help="contenders by name, the first is 1.0")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--r", type=int, help="rank (default: 16, for gralora 32)")
    parser.add_argument("--k", type=int, default=4, help="GraLoRA's blocks along each side (default: %(default)s)")
    parser.add_argument("--hybrid-r", type=int, default=0, help="rank of the LoRA beside GraLoRA's blocks")
    parser.add_argument("--noise-rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--base", choices=["fp32", "bf16", "nf4", "int8"], default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--malloc", choices=["keep", "default"], default="keep", help="default: %(default)s")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    args.r = args.r or (32 if args.compare == "gralora" else 16)
    names = args.methods or SETS[args.compare]

    if args.malloc == "keep":
        keep_freed_memory()
    times = time_steps(names, args)
    memory: dict[str, float] = {}
    if not args.no_memory:
        context = multiprocessing.get_context("spawn")
        for name in names:
            queue = context.Queue()
            process = context.Process(target=peak_memory, args=(name, args, queue))
            process.start()
            memory[name] = queue.get()
            process.join()

    print(
        f"{args.layers} layers of SmolLM2-135M, {args.tokens} tokens, r = {args.r}, {args.base} base, "
        f"{torch.get_num_threads()} threads, medians of {args.rounds} interleaved steps"
    )
    base = statistics.median(times[names[0]])
    for name in names:
        median = statistics.median(times[name])
        paired = statistics.median(t / b for t, b in zip(times[name], times[names[0]], strict=True))
        line = f"{name:18s} {median:7.3f} s   {median / base:5.3f} x   (paired {paired:5.3f} x)"
        if memory:
            line += f"   peak {memory[name]:6.0f} MB   {memory[name] / memory[names[0]]:5.3f} x"
        print(line)


if __name__ == "__main__":
    main()
