"""BiDoRA against DoRA on a few examples: accuracy, and how the updates of magnitude and direction correlate.

    pip install "flatlora[examples]"
    python examples/bidora.py                  # a plain loop
    python examples/bidora.py --trainer        # the Hugging Face Trainer feeds the lower level
    python examples/bidora.py --nf4            # NF4 base, AdamW8bit on both levels
    python examples/bidora.py --train-file train.tsv --test-file test.tsv

DoRA trains directions and magnitudes together on all training texts. BiDoRA searches magnitudes on a fifth of them,
which the directions do not see, and then trains the directions anew on all of them. Both start from the same weights;
DoRA makes as many steps as BiDoRA's second phase. The correlation is DoRA's (arXiv:2402.09353, Eq. 3-4): over the
adapted layers at several checkpoints, the mean change of the magnitudes against the mean change of direction.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    Data,
    data_arguments,
    encode,
    encoder_folder,
    evaluate,
    load_data,
    load_tokenizer,
    make_batches,
    positive,
    quiet,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from flatlora import BilevelOptimizer, direction_parameters, lora_layers, magnitude_parameters, split_dataset
from flatlora.bidora.parameters import correlation, update_changes

CHECKPOINTS = 4


def build_model(args: argparse.Namespace, labels: list[str]) -> nn.Module:
    """The pretrained encoder with DoRA on all linear layers and a new head; in 4 bits for --nf4."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    options: dict[str, Any] = {}
    if args.nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,  # half precision would drown the finite difference
            llm_int8_skip_modules=["classifier", "score"],
        )
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.folder, num_labels=len(labels), local_files_only=True, dtype=torch.float32, **options
    )
    heads = [name for name in ("classifier", "score") if hasattr(model, name)]
    config = LoraConfig(
        r=args.r,
        lora_alpha=2 * args.r,
        target_modules="all-linear",
        use_dora=True,
        modules_to_save=heads,
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, config).train()


def make_optimizer(parameters: list[nn.Parameter], lr: float, args: argparse.Namespace) -> Optimizer:
    if args.nf4:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=lr, weight_decay=0.1)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)


def directions_and_head(model: nn.Module) -> list[nn.Parameter]:
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    return [*direction_parameters(model), *head]


@dataclass
class Texts:
    """Makes dataloaders of encoded texts."""

    tokenizer: Any
    batch_size: int

    def loader(self, rows: Any) -> DataLoader:
        return DataLoader(rows, self.batch_size, shuffle=True, collate_fn=self.collate)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.tokenizer.pad(rows, return_tensors="pt"))


# --- how magnitude and direction have changed ---------------------------------------------------------------------


def changes(model: nn.Module) -> Tensor:
    """ΔM and ΔD of every adapted layer."""
    return update_changes(lora_layers(model))


def summary(points: list[Tensor]) -> str:
    """Pearson's r of ΔD with ΔM, and the slope of the line through the points, ΔM per ΔD."""
    both = torch.cat(points, 1)
    m, d = both - both.mean(1, keepdim=True)
    return f"r = {float(correlation(both)):+.3f}, slope = {float((m @ d) / (d @ d)):+.3f}"


# --- the two methods ----------------------------------------------------------------------------------------------


def dora(model: nn.Module, rows: list[dict[str, Any]], texts: Texts, args: argparse.Namespace) -> list[Tensor]:
    optimizer = make_optimizer([*directions_and_head(model), *magnitude_parameters(model)], args.lr, args)
    points: list[Tensor] = []
    step = 0
    while step < args.steps:
        for batch in texts.loader(rows):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % -(-args.steps // CHECKPOINTS) == 0 or step == args.steps:
                points.append(changes(model))
            if step == args.steps:
                break
    return points


def bidora(model: nn.Module, rows: list[dict[str, Any]], texts: Texts, args: argparse.Namespace) -> list[Tensor]:
    train, val = split_dataset(rows, 0.2, seed=args.seed)
    lower = make_optimizer(directions_and_head(model), args.lr, args)
    upper = make_optimizer(magnitude_parameters(model), args.magnitude_lr, args)
    points: list[Tensor] = []
    options = {"difference": args.difference, "xi": args.xi}
    if args.trainer:
        optimizer = BilevelOptimizer(lower, upper, model, None, texts.loader(val), **options)
        feed_by_trainer(model, optimizer, train, val, texts.collate, args)
        points.append(changes(model))
    else:
        optimizer = BilevelOptimizer(lower, upper, model, texts.loader(train), texts.loader(val), **options)
        for step in range(1, args.search_steps + 1):
            losses = optimizer.step()
            if step % -(-args.search_steps // CHECKPOINTS) == 0 or step == args.search_steps:
                points.append(changes(model))
                r = float(optimizer.metrics()["update_correlation"])
                seen = f"training loss {losses.train_loss:.3f}, validation {losses.val_loss:.3f}, r = {r:+.3f}"
                print(f"  search step {step}: {seen}")
    second = make_optimizer(directions_and_head(model), args.lr, args)
    optimizer.retrain(texts.loader(rows), args.steps, optimizer=second)
    optimizer.remove()
    return [*points, changes(model)]


def feed_by_trainer(model: nn.Module, optimizer: Optimizer, train: Any, val: Any, collate: Any, args: Any) -> None:
    """The search in the Trainer: it runs the training batches, evaluates, schedules and saves checkpoints."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        half = max(args.search_steps // 2, 1)
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.search_steps,
            per_device_train_batch_size=args.batch_size,
            eval_strategy="steps",
            eval_steps=half,
            save_steps=half,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            seed=args.seed,
        )
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        Trainer(model, arguments, collate, train, val, optimizers=(optimizer, scheduler)).train()


def compare(data: Data, args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.folder)
    rows = encode(data.draw(args.examples, args.seed)[0], tokenizer, data.labels)
    held_out = encode(data.held_out, tokenizer, data.labels)
    scored = make_batches(sorted(held_out, key=lambda row: len(row["input_ids"])), tokenizer, 64)

    texts = Texts(tokenizer, args.batch_size)
    print(f"{data.name}: {len(data.labels)} labels, {len(rows)} training and {len(held_out)} held-out texts")
    for name, method in (("DoRA", dora), ("BiDoRA", bidora)):
        model = build_model(args, data.labels)
        points = method(model, rows, texts, args)
        accuracy, loss = evaluate(model, scored)
        print(f"{name:7} accuracy {100 * accuracy:.1f} %, loss {loss:.3f}; ΔM against ΔD: {summary(points)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser, examples=50)
    parser.add_argument("--trainer", action="store_true", help="search inside the Hugging Face Trainer")
    parser.add_argument("--nf4", action="store_true", help="4-bit base weights and 8-bit optimizers")
    parser.add_argument("--search-steps", type=positive, default=60, help="iterations of phase one")
    parser.add_argument("--steps", type=positive, default=100, help="steps of DoRA and of phase two")
    parser.add_argument("--batch-size", type=positive, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--magnitude-lr", type=float, default=1e-3)
    parser.add_argument("--xi", type=float, default=1.0)
    parser.add_argument("--difference", choices=["central", "forward"], default="central")
    parser.add_argument("--r", type=positive, default=4, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    args.folder = encoder_folder(args.model)
    compare(load_data(args.train_file, args.test_file), args)


if __name__ == "__main__":
    main()
