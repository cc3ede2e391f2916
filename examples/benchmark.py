"""Step time and peak memory of the methods against PEFT's LoRA with AdamW, interleaved in one process.

    python examples/benchmark.py                      # SmolLM2-135M's geometry, 1,024 tokens
    python examples/benchmark.py --layers 8 --base nf4
    python examples/benchmark.py --gralora            # GraLoRA, PEFT's and this library's, against LoRA of equal rank

Every round runs one training step of each contender, in an order that rotates; what is printed are ratios of medians.
Weights are random: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from peft import GraloraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flatlora

warnings.filterwarnings("ignore")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LORA = "PEFT LoRA"
GRALORA = ["PEFT GraLoRA", "GraLoRA"]


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
    alpha, targets = 2 * args.r, "all-linear"
    if name == "GraLoRA":
        return flatlora.apply_gralora(model, targets, r=args.r, k=args.k, alpha=alpha, hybrid_r=args.hybrid_r)
    if name == "PEFT GraLoRA":
        return get_peft_model(
            model,
            GraloraConfig(r=args.r, gralora_k=args.k, alpha=alpha, hybrid_r=args.hybrid_r, target_modules=targets),
        )
    return get_peft_model(model, LoraConfig(r=args.r, lora_alpha=alpha, target_modules=targets))


def build(name: str, args: argparse.Namespace) -> Callable[[torch.Tensor], None]:
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
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    passes = 1
    if name.startswith("GGPO"):
        noise = name.split()[1]
        optimizer = flatlora.GGPOOptimizer(optimizer, adapted, noise=noise, noise_rank=args.noise_rank)
    elif name == "two passes":
        passes = 2

    def step(ids: torch.Tensor) -> None:
        for _ in range(passes):
            adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(name: str, args: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    step = build(name, args)
    ids = torch.randint(0, 49152, (1, args.tokens))
    for _ in range(3):
        step(ids)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--r", type=int, help="rank (default: 16, with --gralora 32)")
    parser.add_argument("--gralora", action="store_true", help="compare PEFT's and this library's GraLoRA")
    parser.add_argument("--k", type=int, default=4, help="GraLoRA's blocks along each side (default: %(default)s)")
    parser.add_argument("--hybrid-r", type=int, default=0, help="rank of the LoRA beside GraLoRA's blocks")
    parser.add_argument("--noise-rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--base", choices=["fp32", "bf16", "nf4", "int8"], default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--methods", nargs="*", help="default: GGPO gaussian, GGPO low_rank, two passes")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    args.r = args.r or (32 if args.gralora else 16)
    if args.methods is None:
        args.methods = GRALORA if args.gralora else ["GGPO gaussian", "GGPO low_rank", "two passes"]

    names = [LORA, *args.methods]
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
    del steps
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
    base = statistics.median(times[LORA])
    for name in names:
        median = statistics.median(times[name])
        paired = statistics.median(t / b for t, b in zip(times[name], times[LORA], strict=True))
        line = f"{name:16s} {median:7.3f} s   {median / base:5.3f} x   (paired {paired:5.3f} x)"
        if memory:
            line += f"   peak {memory[name]:6.0f} MB   {memory[name] / memory[LORA]:5.3f} x"
        print(line)


if __name__ == "__main__":
    main()
