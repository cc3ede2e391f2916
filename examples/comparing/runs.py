"""One run: its full configuration, training, and what is measured of it."""

from __future__ import annotations

import argparse
import json
import random
import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import encode, encoder_folder, load_tokenizer, make_batches, mean_loss, trainable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from comparing.data import Texts, Training, load_texts, training_data
from comparing.methods import METHODS, Average, Batch, Fit, fresh_model, restore, snapshot
from flatlora import noise_rise

MEASURES = 1  # part of a run's key: count it up when what is measured changes its meaning
NOISE = 0.2  # of the rise under noise
BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Run:
    """Everything that a run's figures depend on.

    `tuning` holds out `validation` of the training data and is scored on that alone; it never sees the test data.
    """

    data: str
    model: str
    examples: int
    flip: float
    method: str
    strength: float
    lr: float
    epochs: int
    batch_size: int
    r: int
    seed: int
    tuning: bool
    validation: float
    curve_texts: int
    measures: int = MEASURES
    schedule: str = "constant"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def regime(self) -> tuple[str, str, int, float]:
        return self.data, self.model, self.examples, self.flip


# --- what all runs share --------------------------------------------------------------------------------------------


@dataclass
class Task:
    """The pretrained model and all texts, loaded once per process."""

    texts: Texts
    base: nn.Module
    tokenizer: Any
    device: torch.device

    def batches(self, examples: list[Any], size: int = 64) -> list[Batch]:
        """Batches for evaluation."""
        return self.batches_of(encode(examples, self.tokenizer, self.texts.data.labels), size)

    def batches_of(self, rows: list[dict[str, Any]], size: int) -> list[Batch]:
        return [
            {name: value.to(self.device) for name, value in batch.items()}
            for batch in make_batches(rows, self.tokenizer, size)
        ]


def model_name(model: Path | None) -> str:
    folder = model if model is not None and model.suffix == ".gguf" else encoder_folder(model)
    return f"{folder.resolve().parent.name}/{folder.name}"


def load_task(args: argparse.Namespace, texts: Texts | None = None) -> Task:
    """The model is a folder, or a GGUF file of a decoder beside its tokenizer."""
    texts = load_texts(args) if texts is None else texts
    options: dict[str, Any] = {"local_files_only": True}
    if args.model is not None and args.model.suffix == ".gguf":
        folder, options["gguf_file"] = args.model.parent, args.model.name
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        folder = encoder_folder(args.model)
        tokenizer = load_tokenizer(folder)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(texts.data.labels), dtype=torch.float32, **options
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Task(texts, base.to(device), tokenizer, device)


# --- measures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all texts; the model is left in eval mode."""
    model.eval()
    logits = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches]
    return torch.cat(logits).float().cpu(), torch.cat([batch["labels"] for batch in batches]).cpu()


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """ECE: the mean distance of confidence and accuracy over equal bins of confidence, weighted by their texts."""
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [(confidence[bins == b] - right[bins == b]).sum().abs() for b in range(BINS)]
    return float(sum(gaps)) / len(labels)


def score(model: nn.Module, batches: list[Batch], prefix: str = "") -> dict[str, float]:
    logits, labels = predict(model, batches)
    measured = {
        "accuracy": float((logits.argmax(-1) == labels).double().mean()),
        "loss": float(cross_entropy(logits, labels)),
        "ece": calibration_error(logits, labels),
        "matthews": matthews(logits.argmax(-1), labels),
    }
    return {prefix + name: value for name, value in measured.items()}


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation, of any number of classes (Gorodkin, 2004)."""
    count = int(max(predicted.max(), labels.max())) + 1
    p, t = (nn.functional.one_hot(one, count).double() for one in (predicted, labels))
    p, t = p - p.mean(0), t - t.mean(0)
    spread = float((p.square().sum() * t.square().sum()).sqrt())
    return float((p * t).sum()) / spread if spread else 0.0


@dataclass
class Scored:
    """What a run is measured on; empty lists where there is nothing of the kind."""

    validation: list[Batch]
    curve: list[Batch]
    wrong: list[Batch]

    def epoch(self, model: nn.Module) -> dict[str, float]:
        """One point of the training curves."""
        point: dict[str, float] = {}
        for prefix, batches in (("validation_", self.validation), ("", self.curve)):
            if batches:
                measured = score(model, batches)
                point |= {prefix + name: measured[name] for name in ("accuracy", "loss")}
        if self.wrong:
            point["memorised"] = score(model, self.wrong)["accuracy"]
        return point


def what_is_scored(run: Run, task: Task, training: Training) -> Scored:
    data = task.texts.data
    wrong = [example for example, is_wrong in zip(training.examples, training.wrong, strict=True) if is_wrong]
    return Scored(
        task.batches(training.validation) if training.validation else [],
        [] if run.tuning else task.batches(by_length(data.held_out[: run.curve_texts])),
        task.batches(wrong) if wrong and not run.tuning else [],
    )


def by_length(examples: list[Any]) -> list[Any]:
    return sorted(examples, key=lambda example: len(example.text))


# --- a run ----------------------------------------------------------------------------------------------------------


def execute(run: Run, task: Task) -> dict[str, Any]:
    """Trains and measures; the same configuration gives the same figures, times aside."""
    method, data = METHODS[run.method], task.texts.data
    held_out = run.validation if run.tuning or method.stops_early else 0.0
    training = training_data(data, run.examples, run.flip, held_out, run.seed)
    model = fresh_model(task.base, method, run.strength, run.r, run.seed)
    fit = Fit(model, method.optimizer, run.lr, run.strength, epochs_of(run, task, training))
    fit.smoothing = run.strength if method.trick == "smoothing" else 0.0
    fit.decays = run.schedule == "linear"
    curve = train(fit, run, what_is_scored(run, task, training))
    result: dict[str, Any] = {"curve": curve, "step_seconds": statistics.median(fit.times)}
    if run.tuning:
        best = best_epoch(curve) if method.stops_early else -1
        return result | {name: curve[best][name] for name in ("validation_accuracy", "validation_loss")}
    result |= score(model, task.batches(by_length(data.held_out)))
    if task.texts.other:
        result |= score(model, task.batches(by_length(task.texts.other)), "other_")
    if any(training.wrong):
        result["memorised"] = curve[-1 if not method.stops_early else best_epoch(curve)]["memorised"]
    rise = noise_rise(model, mean_loss, task.batches(training.examples[:64]), sigma=NOISE, draws=4, seed=run.seed)
    return result | {"rise": rise.rise}


def epochs_of(run: Run, task: Task, training: Training) -> list[list[Batch]]:
    """The batches of every epoch, the same for all methods of a seed."""
    rows = encode(training.examples, task.tokenizer, task.texts.data.labels)
    shuffle = random.Random(run.seed)
    return [task.batches_of(shuffle.sample(rows, len(rows)), run.batch_size) for _ in range(run.epochs)]


def train(fit: Fit, run: Run, scored: Scored) -> list[dict[str, float]]:
    """Trains, and leaves in the model the weights that the method ends with; returns a point for every epoch."""
    method, parameters = METHODS[run.method], trainable(fit.model)
    average = Average(fit.model, run.strength) if method.trick == "average" else None
    if average is not None:
        fit.after_step = average.update
    curve: list[dict[str, float]] = []
    best: list[Tensor] = []
    for _ in method.loop(fit):
        with nullcontext() if average is None else average.used():
            curve.append(scored.epoch(fit.model))
        if method.stops_early and best_epoch(curve) == len(curve) - 1:
            best = snapshot(parameters)
    if average is not None:
        best = average.means
    if best:
        restore(parameters, best)
    return curve


def best_epoch(curve: list[dict[str, float]]) -> int:
    """The epoch with the best accuracy on the validation examples, of equals the one with the lower loss."""
    return max(range(len(curve)), key=lambda i: (curve[i]["validation_accuracy"], -curve[i]["validation_loss"]))
