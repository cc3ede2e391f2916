"""One run: its full configuration, training, and what is measured of it."""

from __future__ import annotations

import argparse
import json
import random
import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from common import Example, encode, encoder_folder, load_tokenizer, make_batches, trainable
from torch import Tensor, nn

from comparing.data import Texts, Training, load_second, load_texts, training_data
from comparing.methods import METHODS, Average, Batch, Fit, fresh_model, mean_loss, restore, snapshot
from comparing.scoring import score
from flatlora import landscape, noise_rise

MEASURES = 1  # part of a run's key: count it up when what is measured changes its meaning
NOISE = 0.2  # of the rise under noise


@dataclass(frozen=True)
class Run:
    """Everything that a run's figures depend on, and what is measured of it.

    The last fields have defaults that say what runs were before there were these fields, so that those stay readable.
    `tuning` holds out `validation` of the training data and is scored on that alone; it never sees the test data.
    `then` is what is measured of the trained model, a name of `after.AFTER`, or nothing: the scores. `second` names the
    other task's texts, where that takes any.
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
    task: str = "classify"
    landscape: bool = False
    then: str = ""
    second: str = ""
    second_steps: int = 0

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def training(self) -> Run:
        """The run that is scored at once and trains the same model."""
        return replace(self, then="", second="", second_steps=0)


# --- what all runs share --------------------------------------------------------------------------------------------


@dataclass
class Task:
    """The pretrained model and all texts, loaded once per process."""

    texts: Texts
    base: nn.Module
    tokenizer: Any
    device: torch.device
    generates: bool = False  # a label's name, where others classify
    second: Task | None = None  # another task on the same pretrained model

    def batches(self, examples: list[Example], size: int = 64) -> list[Batch]:
        """Batches for evaluation: texts of like length together, as padding costs time."""
        rows = sorted(self.rows(examples), key=lambda row: len(row["input_ids"]))
        return self.batches_of(rows, size)

    def rows(self, examples: list[Example]) -> list[dict[str, Any]]:
        if self.generates:
            return [self._answered(example) for example in examples]
        return encode(examples, self.tokenizer, self.texts.data.labels)

    def batches_of(self, rows: list[dict[str, Any]], size: int) -> list[Batch]:
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        batches = map(padded_answers, parts) if self.generates else make_batches(rows, self.tokenizer, size)
        return [
            {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            for batch in batches
        ]

    def _answered(self, example: Example) -> dict[str, Any]:
        """The text, a question, and the label's name as the answer with the end of the text; `labels` is the answer."""
        prompt = self.tokenizer(example.text, truncation=True, max_length=128)["input_ids"]
        prompt += self.tokenizer("\nTopic:", add_special_tokens=False)["input_ids"]
        answer = self.tokenizer(f" {example.label}", add_special_tokens=False)["input_ids"]
        answer = [*answer, self.tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": answer}


def padded_answers(rows: list[dict[str, Any]]) -> Batch:
    """A batch whose answers end together: logits are asked for there alone, and the vocabulary is large."""
    longest, answer = (max(len(row[name]) for row in rows) for name in ("input_ids", "labels"))
    mask = torch.tensor([[0] * (longest - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows])
    ids = torch.tensor([[0] * (longest - len(row["input_ids"])) + row["input_ids"] for row in rows])
    labels = torch.tensor([[-100] * (answer - len(row["labels"])) + row["labels"] for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
        "logits_to_keep": answer + 1,
    }


def model_name(model: Path | None) -> str:
    folder = model if model is not None and model.suffix == ".gguf" else encoder_folder(model)
    return f"{folder.resolve().parent.name}/{folder.name}"


def load_task(args: argparse.Namespace) -> Task:
    """The task that the arguments name, and the second if they name one."""
    task, second = task_of(load_texts(args), args), load_second(args)
    if second is not None:
        task.second = replace(task, texts=second) if args.generate else task_of(second, args)
    return task


def task_of(texts: Texts, args: argparse.Namespace) -> Task:
    """The model is a folder, or a GGUF file of a decoder beside its tokenizer."""
    options: dict[str, Any] = {"local_files_only": True}
    if args.model is not None and args.model.suffix == ".gguf":
        folder, options["gguf_file"] = args.model.parent, args.model.name
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        folder = encoder_folder(args.model)
        tokenizer = load_tokenizer(folder)
    if args.generate:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    else:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(texts.data.labels), dtype=torch.float32, ignore_mismatched_sizes=True, **options
        )  # a head of another task's may be among the weights; every run begins with a new one
    base.config.pad_token_id = tokenizer.pad_token_id
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Task(texts, base.to(device), tokenizer, device, args.generate)


# --- a run ----------------------------------------------------------------------------------------------------------


@dataclass
class Scored:
    """What a run is measured on; empty lists where there is nothing of the kind."""

    validation: list[Batch]
    curve: list[Batch]

    def epoch(self, model: nn.Module) -> dict[str, float]:
        """One point of the training curves."""
        point: dict[str, float] = {}
        for prefix, batches in (("validation_", self.validation), ("", self.curve)):
            if batches:
                measured = score(model, batches)
                point |= {prefix + name: measured[name] for name in ("accuracy", "loss")}
        return point


def what_is_scored(run: Run, task: Task, training: Training) -> Scored:
    data = task.texts.data
    return Scored(
        task.batches(training.validation) if training.validation else [],
        [] if run.tuning else task.batches(data.held_out[: run.curve_texts]),
    )


@dataclass
class Trained:
    """A run's model at the end of its training. What is measured of it leaves it as it is."""

    run: Run
    task: Task
    training: Training
    model: nn.Module
    curve: list[dict[str, float]]
    step_seconds: float


def trained(run: Run, task: Task) -> Trained:
    """Trains the run's method on a task; the same configuration gives the same weights."""
    method = METHODS[run.method]
    training = split_of(run, task)
    model = fresh_model(task.base, method, run.strength, run.r, run.seed)
    fit = fit_of(run, model, epochs_of(run, task, training))
    curve = train(fit, run, what_is_scored(run, task, training))
    return Trained(run, task, training, model, curve, statistics.median(fit.times))


def execute(run: Run, task: Task) -> dict[str, Any]:
    """Trains and scores; the same configuration gives the same figures, times aside."""
    return scores(trained(run, task))


def scores(done: Trained) -> dict[str, Any]:
    """What is measured of every trained model."""
    run, task, training, model = done.run, done.task, done.training, done.model
    result: dict[str, Any] = {"curve": done.curve, "step_seconds": done.step_seconds}
    if run.tuning:
        best = best_epoch(done.curve) if METHODS[run.method].stops_early else -1
        return result | {name: done.curve[best][name] for name in ("validation_accuracy", "validation_loss")}
    result |= score(model, task.batches(task.texts.data.held_out))
    if task.texts.other:
        result |= score(model, task.batches(task.texts.other), "other_")
    if any(training.wrong):
        wrong = [example for example, is_wrong in zip(training.examples, training.wrong, strict=True) if is_wrong]
        result["memorised"] = score(model, task.batches(wrong))["accuracy"]
    some = task.batches(training.examples[:64])
    result["rise"] = noise_rise(model, mean_loss, some, sigma=NOISE, draws=4, seed=run.seed).rise
    if run.landscape:
        result["landscape"] = asdict(landscape(model, mean_loss, some, points=9, seed=run.seed))
    return result


def split_of(run: Run, task: Task) -> Training:
    """The run's training examples of a task, less what the method holds out of them."""
    held_out = run.validation if run.tuning or METHODS[run.method].stops_early else 0.0
    return training_data(task.texts.data, run.examples, run.flip, held_out, run.seed)


def fit_of(run: Run, model: nn.Module, epochs: list[list[Batch]]) -> Fit:
    """The run's way to train a model, on these batches."""
    method = METHODS[run.method]
    fit = Fit(model, method.optimizer, run.lr, run.strength, epochs)
    fit.smoothing = run.strength if method.trick == "smoothing" else 0.0
    fit.decays = run.schedule == "linear"
    return fit


def epochs_of(run: Run, task: Task, training: Training) -> list[list[Batch]]:
    """The batches of every epoch, the same for all methods of a seed."""
    rows = task.rows(training.examples)
    shuffle = random.Random(run.seed)
    return [task.batches_of(shuffle.sample(rows, len(rows)), run.batch_size) for _ in range(run.epochs)]


def train(fit: Fit, run: Run, scored: Scored) -> list[dict[str, float]]:
    """Trains, and leaves in the model the weights that the method ends with; returns a point for every epoch."""
    method, parameters = METHODS[run.method], trainable(fit.model)
    average = None
    if method.average is not None:
        average = Average(fit.model, method.average(run.strength, sum(map(len, fit.epochs))))
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
