"""What is left of an adapter after training: a function for each word of `--then`, and the figures of its table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import trainable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from comparing.data import Training
from comparing.methods import METHODS, Batch, answer_logits, fresh_model, head_names, mean_loss, restore, snapshot
from comparing.quantised import ROUNDINGS, merged, rounded
from comparing.report import Figure
from comparing.runs import (
    NOISE,
    Run,
    Scored,
    Task,
    Trained,
    epochs_of,
    fit_of,
    scores,
    split_of,
    train,
    trained,
    what_is_scored,
)
from comparing.scoring import agreement, auroc, score
from flatlora import remove_perturbation, weight_noise

SCALES = (0.25, 0.5, 0.75, 1.0)  # of an adapter after training
SUMS = {"sum": 1.0, "sum_x0.75": 0.75, "sum_x0.5": 0.5}  # of two adapters, each at a part of what it was trained to
DENSITY = 0.5  # of TIES and DARE: the share of the weights that is kept
LOOKS = 4  # at both tasks, while the second is trained
WINDOWS, WINDOW = 16, 128  # of general text: how many, and their tokens
RADIUS = 0.05  # of the ascent step
DRAWS = 4  # of noise

Scores = dict[str, Any]


def execute_all(runs: list[Run], task: Task) -> list[Scores]:
    """Trains once and takes the measure of each run: they differ in what is measured alone."""
    done = trained(runs[0].training, task)
    return [AFTER[run.then].measure(replace(done, run=run)) if run.then else scores(done) for run in runs]


def held_out(task: Task) -> list[Batch]:
    return task.batches(task.texts.data.held_out)


# --- merged and rounded ---------------------------------------------------------------------------------------------


def quantise(done: Trained) -> Scores:
    """The merged model with its weights rounded: scores, the share of texts it answers as before, what was lost."""
    whole, batches, answers = merged(done.model), held_out(done.task), []
    before = score(whole, batches, "merged_", answers)
    result: Scores = dict(before)
    for kind in ROUNDINGS:
        others: list[Tensor] = []
        result |= score(rounded(whole, kind), batches, f"{kind}_", others)
        result[f"{kind}_agreement"] = agreement(answers, others)
        for name in ("accuracy", "loss"):
            result[f"{kind}_{name}_change"] = result[f"{kind}_{name}"] - before[f"merged_{name}"]
    return result


def merge(done: Trained) -> Scores:
    """Adapters over the base that they were trained on and over the other: the float weights, and those in NF4."""
    bases = {"float": done.task.base, "nf4": rounded(done.task.base, "nf4")}
    models = {"float": done.model, "nf4": trained(done.run, replace(done.task, base=bases["nf4"])).model}
    result: Scores = {}
    for of, model in models.items():
        for on, base in bases.items():
            result |= score(merged(over(base, model)), held_out(done.task), f"{of}_on_{on}_")
        other = "nf4" if of == "float" else "float"
        for name in ("accuracy", "loss"):
            result[f"{of}_{name}_change"] = result[f"{of}_on_{other}_{name}"] - result[f"{of}_on_{of}_{name}"]
    return result


@torch.no_grad()
def over(base: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a model with adapters over the frozen weights of another base."""
    model, weights = copy.deepcopy(model), dict(base.named_parameters())
    for name, p in model.named_parameters():
        inside = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if not p.requires_grad and inside in weights:
            p.copy_(weights[inside])
    return model


# --- scaled back -----------------------------------------------------------------------------------------------------


def scale(done: Trained) -> Scores:
    """The adapter at a part of what it was trained to: the task's scores, and what a decoder then has forgotten."""
    whole, pieces = merged(done.model), windows(done.task) if done.task.generates else []
    before = language_loss(done.task.base, pieces) if pieces else 0.0
    result: Scores = {}
    for factor in SCALES:
        model = scaled(done.task.base, whole, factor)
        result |= score(model, held_out(done.task), f"x{factor:g}_")
        if pieces:
            result[f"x{factor:g}_forgotten"] = language_loss(model, pieces) - before
    for factor in SCALES[:-1]:
        for name in ("accuracy", "loss"):
            result[f"x{factor:g}_{name}_change"] = result[f"x{factor:g}_{name}"] - result[f"x1_{name}"]
    return result


@torch.no_grad()
def scaled(base: nn.Module, whole: nn.Module, factor: float) -> nn.Module:
    """A copy of a merged model with `factor` times what was changed of the base; a new head stays whole."""
    model, heads, before = copy.deepcopy(whole), head_names(base), dict(base.named_parameters())
    for name, p in model.named_parameters():
        if name.split(".")[0] not in heads:
            p.lerp_(before[name], 1 - factor)
    return model


# --- two tasks ------------------------------------------------------------------------------------------------------


def second_task(done: Trained) -> Task:
    assert done.task.second is not None, "checked with the arguments"
    return done.task.second


def swap_head(model: nn.Module, head: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Puts another task's head on a model, with adapters or merged, and returns the one that was there.

    PEFT keeps the head that is trained beside the one that came with the model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = {}
    for name in head_names(model):
        owner = model.get_submodule(name)
        owner, name_there = (owner.modules_to_save, "default") if hasattr(owner, "modules_to_save") else (model, name)
        before[name] = getattr(owner, name_there)
        if name in head:
            setattr(owner, name_there, head[name])
    return before


def add(done: Trained) -> Scores:
    """The adapters of two tasks, trained apart, in one model: the mean accuracy of both, each under its own head."""
    tasks = [done.task, second_task(done)]
    models = [done.model, trained(done.run, tasks[1]).model]
    apart = [score(model, held_out(task)) for model, task in zip(models, tasks, strict=True)]
    wholes = [merged(model) for model in models]
    heads = [swap_head(whole, {}) for whole in wholes]
    result: Scores = {"apart_accuracy": (apart[0]["accuracy"] + apart[1]["accuracy"]) / 2}
    together = {}
    for name, factor in SUMS.items():
        together[name] = summed(done.task.base, *(scaled(done.task.base, whole, factor) for whole in wholes))
    for kind in ("linear", "ties", "dare_linear"):
        together[kind] = weighted(*models, kind, done.run.seed)
    for kind, model in together.items():
        for place, task, head in zip(("first", "second"), tasks, heads, strict=True):
            swap_head(model, head)
            result[f"{kind}_{place}_accuracy"] = score(model, held_out(task))["accuracy"]
        result[f"{kind}_accuracy"] = (result[f"{kind}_first_accuracy"] + result[f"{kind}_second_accuracy"]) / 2
        result[f"{kind}_change"] = result[f"{kind}_accuracy"] - result["apart_accuracy"]
    return result


@torch.no_grad()
def summed(base: nn.Module, model: nn.Module, other: nn.Module) -> nn.Module:
    """A merged model, to which what another changed of their base is added, the heads aside."""
    heads, before, changed = head_names(base), dict(base.named_parameters()), dict(other.named_parameters())
    for name, p in model.named_parameters():
        if name.split(".")[0] not in heads:
            p.add_(changed[name] - before[name])
    return model


@torch.no_grad()
def weighted(model: nn.Module, other: nn.Module, kind: str, seed: int) -> nn.Module:
    """Two PEFT models with LoRA as one merged model, by `add_weighted_adapter` with the weights 1 and 1."""
    model, other = copy.deepcopy(model), copy.deepcopy(other)
    remove_perturbation(model)
    remove_perturbation(other)
    model.add_adapter("second", replace(model.peft_config["default"]))  # type: ignore
    for module in model.modules():  # PEFT adds no adapters that have heads
        if "second" in getattr(module, "modules_to_save", ()):
            del module.modules_to_save["second"]  # type: ignore
    places = dict(model.named_parameters())
    for name, p in other.named_parameters():
        if ".lora_" in name:
            places[name.replace(".default", ".second")].copy_(p)
    torch.manual_seed(seed)  # DARE draws what it keeps
    density = None if kind in ("linear", "cat") else DENSITY
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type=kind, density=density)  # type: ignore
    return model.merge_and_unload(adapter_names=["both"])  # type: ignore[operator]


@dataclass
class ScoredBoth(Scored):
    """While a second task is trained, the first is scored too, under its own head."""

    first: list[Batch]
    head: dict[str, nn.Module]

    def epoch(self, model: nn.Module) -> dict[str, float]:
        point = super().epoch(model)
        second = swap_head(model, self.head)
        point |= {name: value for name, value in score(model, self.first, "first_").items() if "accuracy" in name}
        swap_head(model, second)
        return point


def sequence(done: Trained) -> Scores:
    """The second task, then, on the same adapters and under a new head: a curve of both accuracies over its steps."""
    run, task = done.run, second_task(done)
    model, fresh = copy.deepcopy(done.model), fresh_model(task.base, METHODS[run.method], run.strength, run.r, run.seed)
    remove_perturbation(model)
    first_head = swap_head(model, swap_head(fresh, {}))
    for p, other in zip(model.parameters(), fresh.parameters(), strict=True):
        p.requires_grad_(other.requires_grad)  # BiDoRA ends with its magnitudes frozen
    training = split_of(run, task)
    looked_at = what_is_scored(run, task, training)
    first = done.task.batches(done.task.texts.data.held_out[: run.curve_texts])
    both = ScoredBoth(looked_at.validation, looked_at.curve, first, first_head)
    before = both.epoch(model)
    torch.manual_seed(run.seed)
    points = [before, *train(fit_of(run, model, some_steps(run, task, training)), run, both)]
    return {
        "steps": [i * run.second_steps // LOOKS for i in range(LOOKS + 1)],
        "sequence": points,
        "first_accuracy": points[-1]["first_accuracy"],
        "first_change": points[-1]["first_accuracy"] - before["first_accuracy"],
        "first_early_change": points[1]["first_accuracy"] - before["first_accuracy"],
        "second_accuracy": points[-1]["accuracy"],
    }


def some_steps(run: Run, task: Task, training: Training) -> list[list[Batch]]:
    """The batches of `second_steps` steps in as many equal parts as there are looks."""
    per_epoch = -(-len(training.examples) // run.batch_size)
    epochs = epochs_of(replace(run, epochs=-(-run.second_steps // per_epoch)), task, training)
    batches = [batch for epoch in epochs for batch in epoch]
    size = run.second_steps // LOOKS
    return [batches[i * size : (i + 1) * size] for i in range(LOOKS)]


# --- the base's own abilities ---------------------------------------------------------------------------------------


def general(done: Trained) -> Scores:
    """A decoder's loss on general English text, CPython's manual pages, with its adapters and without."""
    batches = windows(done.task)
    whole = merged(done.model)
    before, after = (language_loss(model, batches) for model in (done.task.base, whole))
    task_loss = score(whole, held_out(done.task))["loss"]
    return {"general_before": before, "general_loss": after, "general_change": after - before, "task_loss": task_loss}


def windows(task: Task) -> list[Tensor]:
    """Pieces of the text, evenly spaced."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    pieces = len(text) // WINDOWS
    ids = [task.tokenizer(text[i * pieces : (i + 1) * pieces])["input_ids"][:WINDOW] for i in range(WINDOWS)]
    return [torch.tensor([piece], device=task.device) for piece in ids]


@torch.no_grad()
def language_loss(model: nn.Module, pieces: list[Tensor]) -> float:
    """Mean loss of a token given those before it, in nats."""
    model.eval()
    losses = [cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:]) for ids in pieces]
    return float(torch.stack(losses).mean())


# --- who is mislabelled ---------------------------------------------------------------------------------------------


def detect(done: Trained) -> Scores:
    """AUROC of the training examples' losses, and of their rises under perturbations, as detectors of wrong labels."""
    run, model = done.run, done.model
    batches = done.task.batches_of(done.task.rows(done.training.examples), 64)
    wrong = torch.tensor(done.training.wrong)
    model.eval()
    plain = example_losses(model, batches)
    noisy = torch.zeros_like(plain)
    with weight_noise(model, NOISE, seed=run.seed) as noise:
        for noise.step in range(DRAWS):
            noisy += example_losses(model, batches) / DRAWS
    ascended = copy.deepcopy(model)
    remove_perturbation(ascended)
    ascend(ascended, batches)
    found = {"loss": plain, "noise": noisy - plain, "ascent": example_losses(ascended, batches) - plain}
    result = {f"{name}_auroc": auroc(scores, wrong) for name, scores in found.items()}
    return result | {f"{name}_gain": result[f"{name}_auroc"] - result["loss_auroc"] for name in ("noise", "ascent")}


@torch.no_grad()
def example_losses(model: nn.Module, batches: list[Batch]) -> Tensor:
    """The loss of every example; of a generated answer, the mean over its tokens."""

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            logits, labels = answer_logits(model, batch).float(), batch["labels"]
            if labels.dim() == 1:
                yield cross_entropy(logits, labels, reduction="none")
            else:
                each = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
                yield each.sum(1) / (labels != -100).sum(1)

    return torch.cat(list(losses())).cpu()


def ascend(model: nn.Module, batches: list[Batch]) -> None:
    """A step of length RADIUS up the gradient of the mean loss by the trained parameters, as two-pass SAM takes it."""
    parameters = trainable(model)
    for batch in batches:
        (mean_loss(model, batch) * len(batch["labels"])).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    restore(parameters, [p + RADIUS * g / norm for p, g in zip(snapshot(parameters), grads, strict=True)])


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class After:
    """A measure, the figures of its table, in which every method is compared with its baseline, and which are drawn."""

    measure: Callable[[Trained], Scores]
    figures: list[Figure]
    drawn: str  # how the names of those end that are in the picture, all of one unit


def of_rounding(kind: str) -> list[Figure]:
    return [
        Figure(f"{kind}: change of accuracy, points", f"{kind}_accuracy_change", 100, ".2f"),
        Figure(f"{kind}: change of loss", f"{kind}_loss_change", 1, ".4f"),
        Figure(f"{kind}: answers kept, %", f"{kind}_agreement", 100, ".1f"),
    ]


def of_scale(factor: float) -> list[Figure]:
    """A decoder's has the loss on general text too; the changes are of one adapter, against the whole of it."""
    name = f"x{factor:g}"
    changes = [
        Figure(f"{name}: accuracy, less that of the whole, points", f"{name}_accuracy_change", 100, ".2f", True),
        Figure(f"{name}: loss, less that of the whole", f"{name}_loss_change", 1, ".4f", True),
    ]
    return [
        Figure(f"{name}: accuracy, %", f"{name}_accuracy", 100, ".1f"),
        Figure(f"{name}: loss", f"{name}_loss", 1, ".4f"),
        Figure(f"{name}: loss on general text, change", f"{name}_forgotten", 1, ".4f"),
        *(changes if factor != 1 else []),
    ]


AFTER = {
    "merge": After(
        merge,
        [
            Figure("trained and merged over float, %", "float_on_float_accuracy", 100, ".1f"),
            Figure("trained over NF4, used there, %", "nf4_on_nf4_accuracy", 100, ".1f"),
            Figure("trained over float, over NF4: change, points", "float_accuracy_change", 100, ".2f"),
            Figure("trained over float, over NF4: change of loss", "float_loss_change", 1, ".4f"),
            Figure("trained over NF4, into float: change, points", "nf4_accuracy_change", 100, ".2f"),
            Figure("trained over NF4, into float: change of loss", "nf4_loss_change", 1, ".4f"),
        ],
        "_loss_change",
    ),
    "quantise": After(quantise, [figure for kind in ROUNDINGS for figure in of_rounding(kind)], "_loss_change"),
    "scale": After(scale, [figure for factor in SCALES for figure in of_scale(factor)], "_loss"),
    "add": After(
        add,
        [
            Figure("apart, mean accuracy, %", "apart_accuracy", 100, ".1f"),
            *(
                Figure(f"{kind}: {what}", f"{kind}_{name}", 100, ".1f")
                for kind in (*SUMS, "linear", "ties", "dare_linear")
                for what, name in (("mean accuracy, %", "accuracy"), ("change, points", "change"))
            ),
        ],
        "_change",
    ),
    "sequence": After(
        sequence,
        [
            Figure("first task at the end, %", "first_accuracy", 100, ".1f"),
            Figure("change since it was trained, points", "first_change", 100, ".1f"),
            Figure("change over the first quarter, points", "first_early_change", 100, ".1f"),
            Figure("second task, %", "second_accuracy", 100, ".1f"),
        ],
        "_accuracy",
    ),
    "general": After(
        general,
        [
            Figure("loss on general text: change", "general_change", 1, ".4f"),
            Figure("loss on the task", "task_loss", 1, ".3f"),
        ],
        "_change",
    ),
    "detect": After(
        detect,
        [
            Figure("AUROC of the loss, %", "loss_auroc", 100, ".1f"),
            Figure("of its rise under noise, %", "noise_auroc", 100, ".1f"),
            Figure("rise under noise, less the loss itself, points", "noise_gain", 100, ".1f", against_zero=True),
            Figure("of its rise after an ascent step, %", "ascent_auroc", 100, ".1f"),
            Figure("rise after ascent, less the loss itself, points", "ascent_gain", 100, ".1f", against_zero=True),
        ],
        "_auroc",
    ),
}
