"""Is the perturbation that a method trains under an adversary? Rises of the loss along the way, at one norm.

    pip install "flatlora[examples]"
    python examples/research/adversary.py --flip 0.4 --rho 0.05 0.3 --seeds 2-3

While Bi-LoRA trains, every few steps and on the batch that comes next, unperturbed and in eval mode: how much does the
loss rise along its auxiliary; along the projection P(G) of the last batch's gradient, which LoRASAM takes; along the
projection of this batch's own gradient; and along that gradient itself, which two-pass SAM takes? All are scaled to the
auxiliary's Frobenius norm over all layers. The rows are Bi-LoRA as published and changes that might help its auxiliary.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from common import encode, quiet
from compare import build_parser, parse_arguments
from comparing.data import training_data
from comparing.methods import METHODS, Batch, fresh_model
from comparing.runs import Task, load_task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from flatlora import BiLoRAOptimizer, LoRALayer, lora_layers

EVERY = 8  # steps between two looks
COLUMNS = ("auxiliary", "last P(G)", "own P(G)", "own G", "cos(aux, G)", "cos(last, G)", "cos(aux, former)")


@dataclass(frozen=True)
class Change:
    """What is done otherwise than in Bi-LoRA as published."""

    name: str
    ratio: float = 1.0  # of the auxiliary's learning rate to the primary's
    momentum: float = 0.9  # the auxiliary's
    reset: int = 0  # steps between two fresh starts of the auxiliary
    rest: int = 0  # steps that the primary moves, and then rests, in turn


CHANGES = (
    Change("as published"),
    Change("auxiliary reset every 8 steps", reset=8),
    Change("primary rests 8 of 16 steps", rest=8),
    Change("auxiliary's lr × 0.1", ratio=0.1),
    Change("auxiliary's lr × 10", ratio=10.0),
    Change("auxiliary's lr × 100", ratio=100.0),
    Change("auxiliary's lr × 10, no momentum", ratio=10.0, momentum=0.0),
)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])


def gradients(model: nn.Module, layers: list[LoRALayer], batch: Batch) -> list[Tensor]:
    """The dense gradients by the layers' weights, of the unperturbed model."""
    weights = [layer.module.base_layer.weight for layer in layers]  # type: ignore[union-attr]
    model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    found = torch.autograd.grad(loss_of(model, batch), weights)  # type: ignore[arg-type]
    for weight in weights:
        weight.requires_grad_(False)
    return list(found)


def projections(layers: list[LoRALayer], dense: list[Tensor]) -> list[Tensor]:
    """P(G) on every adapter's tangent space, by pseudo-inverses in float64."""
    found = []
    for layer, gradient in zip(layers, dense, strict=True):
        [adapter] = layer.adapters()
        a, b, g = (tensor.detach().double() for tensor in (adapter.A, adapter.B, gradient))
        onto_a, onto_b = torch.linalg.pinv(a) @ a, b @ torch.linalg.pinv(b)
        found.append((onto_b @ g + g @ onto_a - onto_b @ g @ onto_a).to(gradient))
    return found


def dot(one: list[Tensor], other: list[Tensor]) -> float:
    return float(torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum())


def cosine(one: list[Tensor], other: list[Tensor]) -> float:
    size = (dot(one, one) * dot(other, other)) ** 0.5
    return dot(one, other) / size if size else 0.0


@torch.no_grad()
def rise(model: nn.Module, layers: list[LoRALayer], batch: Batch, direction: list[Tensor], norm: float) -> float:
    """By how much the loss rises where the weights move along a direction by a Frobenius norm over all layers."""
    weights = [layer.module.base_layer.weight for layer in layers]  # type: ignore[union-attr]
    kept = [weight.clone() for weight in weights]  # type: ignore[union-attr]
    model.eval()
    before, size = loss_of(model, batch), dot(direction, direction) ** 0.5
    for weight, part in zip(weights, direction, strict=True):
        weight.add_(part, alpha=norm / size if size else 0.0)  # type: ignore[union-attr]
    after = loss_of(model, batch)
    for weight, value in zip(weights, kept, strict=True):
        weight.copy_(value)  # type: ignore[union-attr]
    return float(after - before)


def auxiliary_of(optimizer: BiLoRAOptimizer) -> list[Tensor]:
    """s2·B2·A2 of every layer."""
    factors = [p.detach() for p in optimizer.perturbation_parameters()]
    return [b @ a for a, b in zip(factors[0::2], factors[1::2], strict=True)]  # scaled below, to one norm for all


def look(task: Task, change: Change, args: argparse.Namespace, rho: float, seed: int) -> list[dict[str, float]]:
    """Trains with Bi-LoRA, and a row of `COLUMNS` for every look, the first quarter of the training left out."""
    [examples], [flip], [epochs], [lr] = args.examples, args.flip, args.epochs, args.lr
    training = training_data(task.texts.data, examples, flip, 0.0, seed)
    rows, shuffle = encode(training.examples, task.tokenizer, task.texts.data.labels), random.Random(seed)
    batches = [
        batch for _ in range(epochs) for batch in task.batches_of(shuffle.sample(rows, len(rows)), args.batch_size)
    ]
    model = fresh_model(task.base, METHODS["lora"], 0.0, args.r, seed)
    layers = lora_layers(model)
    optimizer = BiLoRAOptimizer.for_model(model, AdamW, rho=rho, lr=lr)
    primary, ascent = optimizer.param_groups
    ascent |= {"lr": lr * change.ratio, "betas": (change.momentum, 0.999)}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    start = optimizer.current_perturbation()
    last: list[Tensor] = []
    former: list[Tensor] = []
    found = []
    for i, batch in enumerate(batches):
        if i and i % EVERY == 0:
            auxiliary, norm = auxiliary_of(optimizer), optimizer.perturbation_norm()
            own = gradients(model, layers, batch)
            directions = (auxiliary, last, projections(layers, own), own)
            values = [rise(model, layers, batch, direction, norm) for direction in directions]
            cosines = [cosine(auxiliary, own), cosine(last, own), cosine(auxiliary, former) if former else 0.0]
            found.append(dict(zip(COLUMNS, [*values, *cosines], strict=True)))
            former = auxiliary
        if (i + 1) % EVERY == 0:
            last = projections(layers, gradients(model, layers, batch))
        if change.reset and i and i % change.reset == 0:
            for p, value in zip(optimizer.perturbation_parameters(), start, strict=True):
                p.data.copy_(value)
                optimizer.state.pop(p, None)
        model.train()
        loss_of(model, batch).backward()
        if change.rest and i // change.rest % 2:
            for p in primary["params"]:
                p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return found[len(found) // 4 :]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.05], help="radii of Bi-LoRA")
    parser.set_defaults(seeds=[2], examples=[256], flip=[0.4], results=Path("unused"))
    args = parse_arguments(parser=parser)
    quiet()
    torch.set_num_threads(1)
    task = load_task(args)
    print(f"| ρ | | {' | '.join(COLUMNS)} |\n{'| --- ' * (2 + len(COLUMNS))}|")
    for rho in args.rho:
        for change in CHANGES:
            looks = [one for seed in args.seeds for one in look(task, change, args, rho, seed)]
            means = [statistics.mean(one[column] for one in looks) for column in COLUMNS]
            print(f"| {rho:g} | {change.name} | {' | '.join(f'{mean:.3f}' for mean in means)} |", flush=True)


if __name__ == "__main__":
    main()
