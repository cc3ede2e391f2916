"""What a model's answers are worth: accuracy, loss, calibration, and the AUROC of a detector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from comparing.methods import Batch, answer_logits

BINS = 15  # of the calibration error
COVERAGE = 0.8  # share of the texts that are answered where the least confident answers are withheld


@torch.no_grad()
def score(model: nn.Module, batches: list[Batch], prefix: str = "", answers: list[Tensor] | None = None) -> dict:
    """What is measured on texts; the model is left in eval mode. A list `answers` takes the answers of every batch."""
    model.eval()
    answers = [] if answers is None else answers
    if batches[0]["labels"].dim() == 2:
        measured = score_answers(model, batches, answers)
    else:
        logits = torch.cat([answer_logits(model, batch) for batch in batches]).float().cpu()
        labels = torch.cat([batch["labels"] for batch in batches]).cpu()
        answers.append(logits.argmax(-1)[:, None])
        measured = {
            "accuracy": float((logits.argmax(-1) == labels).double().mean()),
            "loss": float(cross_entropy(logits, labels)),
            "matthews": matthews(logits.argmax(-1), labels),
            **calibration(logits, labels),
        }
    return {prefix + name: value for name, value in measured.items()}


def score_answers(model: nn.Module, batches: list[Batch], answers: list[Tensor]) -> dict[str, float]:
    """Exact match, as `accuracy`, and the loss of an answer's token.

    Greedy generation gives the answer, its end included, just where every token of it is the likeliest after those
    before it: one pass tells.
    """
    right, texts, loss, tokens = 0, 0, 0.0, 0
    for batch in batches:
        logits, labels = answer_logits(model, batch).float(), batch["labels"]
        loss += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        tokens += int((labels != -100).sum())
        answers.append(logits.argmax(-1).where(labels != -100, -100))
        right += int((answers[-1] == labels).all(1).sum())
        texts += len(labels)
    return {"accuracy": right / texts, "loss": loss / tokens}


def agreement(answers: list[Tensor], others: list[Tensor]) -> float:
    """Share of the texts that two models answer alike, right or wrong."""
    alike = torch.cat([(a == b).all(1) for a, b in zip(answers, others, strict=True)])
    return float(alike.double().mean())


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Matthews' correlation, of any number of classes (Gorodkin, 2004)."""
    count = int(max(predicted.max(), labels.max())) + 1
    p, t = (one_hot(one, count).double() for one in (predicted, labels))
    p, t = p - p.mean(0), t - t.mean(0)
    spread = float((p.square().sum() * t.square().sum()).sqrt())
    return float((p * t).sum()) / spread if spread else 0.0


# --- confidence -----------------------------------------------------------------------------------------------------


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """ECE, Brier score, accuracy of the most confident answers, and ECE after temperature scaling.

    The temperature is fitted on every other text and the last of these measured on the texts between: what a single
    number repairs is not counted.
    """
    p = logits.double().softmax(-1)
    surest = p.max(-1).values.argsort(descending=True, stable=True)[: max(1, round(COVERAGE * len(labels)))]
    measured = {
        "ece": calibration_error(logits, labels),
        "brier": float((p - one_hot(labels, p.shape[-1])).square().sum(-1).mean()),
        "covered_accuracy": float((logits.argmax(-1) == labels)[surest].double().mean()),
    }
    if len(labels) > 1:
        heat = temperature(logits[::2], labels[::2])
        measured["scaled_ece"] = calibration_error(logits[1::2] / heat, labels[1::2])
    return measured


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """ECE: the mean distance of confidence and accuracy over equal bins of confidence, weighted by their texts."""
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [(confidence[bins == b] - right[bins == b]).sum().abs() for b in range(BINS)]
    return float(sum(gaps)) / len(labels)


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature, between 1/100 and 100, at which the logits have the lowest loss (Guo et al., 2017).

    The loss is convex in 1/T, with the slope ``mean(E_p[z] - z_label)``: its zero is found by bisection of log(1/T).
    """
    z = logits.double()
    low, high = -torch.tensor(100.0, dtype=z.dtype).log(), torch.tensor(100.0, dtype=z.dtype).log()
    for _ in range(50):
        middle = (low + high) / 2
        expected = ((z * middle.exp()).softmax(-1) * z).sum(-1)
        rises = (expected - z.gather(1, labels[:, None])[:, 0]).mean() > 0
        low, high = (low, middle) if rises else (middle, high)
    return float((-(low + high) / 2).exp())


# --- detectors ------------------------------------------------------------------------------------------------------


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Share of the pairs of a positive and a negative in which the positive has the higher score; a tie is half."""
    above = scores[positive][:, None] - scores[~positive]
    return float((above > 0).double().mean() + (above == 0).double().mean() / 2)
