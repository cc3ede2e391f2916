"""examples/research/compare.py: resuming, statistics, wrong labels, choices without test data, methods, pictures."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from models import llama, quantised
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parent.parent / "examples" / "research"
sys.path.insert(0, str(EXAMPLES))

import compare  # noqa: E402
from common import Example, encode, trainable  # noqa: E402
from comparing import runs as runs_module  # noqa: E402
from comparing.data import flip_labels, load_named, training_data  # noqa: E402
from comparing.methods import (  # noqa: E402
    METHODS,
    Average,
    Fit,
    against_the_new,
    fresh_model,
    in_pairs,
    last,
    last_gradient,
    moving,
    one_pass_sam,
    with_radius,
)
from comparing.quantised import rounded  # noqa: E402
from comparing.report import holm, paired_difference, table  # noqa: E402
from comparing.runs import execute, load_task, train  # noqa: E402
from comparing.scoring import calibration_error, matthews, score  # noqa: E402
from comparing.store import Store  # noqa: E402

pytest.importorskip("scipy")
GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "awful"]
NOUNS = [f"noun{i}" for i in range(30)]
NEW_FIELDS = (
    "task",
    "landscape",
    "then",
    "second",
    "second_steps",
)  # of a run, which the first results files do not have


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny encoder with its tokenizer, and sentences whose label is plain from one word."""
    folder = tmp_path_factory.mktemp("compare")
    words = ["[PAD]", "[UNK]", "the", "was", *GOOD, *BAD, *NOUNS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        meaning = model.get_input_embeddings().weight.normal_()
        for word in GOOD + BAD:
            meaning[words.index(word), :4] += 4 if word in GOOD else -4
    model.save_pretrained(folder)
    lines = [f"{int(word in GOOD)}\tthe {noun} was {word}" for noun in NOUNS for word in GOOD + BAD]
    random.Random(0).shuffle(lines)
    for name, part in (("train", lines[:100]), ("test", lines[100:])):
        (folder / f"{name}.tsv").write_text("\n".join(["label\tsentence", *part]), encoding="utf-8")
    return folder


PACKAGES = {"sam": "pytorch_optimizer", "ivon": "ivon"}  # of rivals that others wrote


def arguments(files, *more):
    return [
        *("--model", str(files), "--train-file", str(files / "train.tsv"), "--test-file", str(files / "test.tsv")),
        *("--examples", "32", "--epochs", "2", "--r", "4", "--flip", "0.25", "--lr", "0.003", "--curve-texts", "80"),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def task(files):
    return load_task(compare.parse_arguments(arguments(files)))


def a_run(files, task, /, method="lora", **changes):
    regime = compare.regimes(compare.parse_arguments(arguments(files)), task.texts.name)[0]
    strength = (METHODS[method].strengths or (0.0,))[0]
    return dataclasses.replace(compare.of(regime, compare.Setting(method, strength, 3e-3), 0), **changes)


# --- resuming -------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def without_times(result):
    return {name: value for name, value in result.items() if name != "step_seconds"}


def test_a_comparison_that_is_complete_makes_no_run(files, task, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    with Store(path) as store:
        store.add(a_run(files, task), planted(0.5))
    before = path.read_bytes()
    monkeypatch.setattr(compare, "results_of", lambda *_: pytest.fail("a run was made"))
    monkeypatch.setattr(
        sys, "argv", ["compare.py", *arguments(files, "--runs", "lora", "--seeds", 0), "--results", str(path)]
    )
    compare.main()
    assert path.read_bytes() == before


def test_only_the_last_line_may_be_torn(files, task, tmp_path):
    path = tmp_path / "results.jsonl"
    run = a_run(files, task)
    with Store(path) as store:
        store.add(run, {"accuracy": 0.5})
        with pytest.raises(SystemExit, match="another process"):
            Store(path)
        assert run in Store(path, read_only=True)
    line = path.read_bytes()
    path.write_bytes(line + line[:-1])
    assert len(Store(path, read_only=True).results) == 1 and path.read_bytes() == line + line[:-1]
    with Store(path) as store:
        assert run in store and store[run] == {"accuracy": 0.5} and path.read_bytes() == line
        assert dataclasses.replace(run, seed=1) not in store
    path.write_bytes(line[:40] + b"\n" + line)
    with pytest.raises(SystemExit, match="line 1 is not a result"):
        Store(path)


def test_every_part_of_the_configuration_is_in_the_key(files, task):
    run = a_run(files, task)
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        other = not value if isinstance(value, bool) else value + ("x" if isinstance(value, str) else 1)
        assert dataclasses.replace(run, **{field.name: other}).key != run.key


def test_results_from_before_a_field_was_there_are_still_found(files, task, tmp_path):
    """A line of the first version of the results file."""
    run = a_run(files, task)
    old = {name: value for name, value in dataclasses.asdict(run).items() if name not in NEW_FIELDS}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"run": old, "result": {"accuracy": 0.5}}) + "\n")
    with Store(path) as store:
        assert store[run] == {"accuracy": 0.5} and run.measures == 1
        assert dataclasses.replace(run, then="quantise") not in store
    path.write_text(json.dumps({"run": old | {"quantise": True}, "result": {"accuracy": 0.5, "nf4_accuracy": 0.4}}))
    path.write_text(path.read_text() + "\n")
    assert Store(path, read_only=True)[run]["accuracy"] == 0.5


# --- statistics -----------------------------------------------------------------------------------------------------


def planted(accuracy, **more):
    curve = [{"accuracy": accuracy / 2, "loss": 1.0}, {"accuracy": accuracy, "loss": 0.5}]
    return {"accuracy": accuracy, "loss": 0.5, "ece": 0.1, "step_seconds": 0.1, "curve": curve, **more}


def two_methods(effect, rng, n=10):
    """Accuracies of a baseline and of a method, whose seeds differ by far more than the methods do."""
    seeds = rng.normal(0.7, 0.1, n)
    return seeds + effect + rng.normal(0, 0.01, n), seeds + rng.normal(0, 0.01, n)


def test_a_planted_effect_is_found():
    rng = np.random.default_rng(0)
    for effect in (0.05, -0.05):
        found = paired_difference(*two_methods(effect, rng))
        assert found.p < 0.001 and abs(found.mean - effect) < 3 * found.error and found.n == 10


def test_p_values_of_a_planted_null_are_uniform():
    from scipy import stats

    rng = np.random.default_rng(1)
    p = [paired_difference(*two_methods(0.0, rng)).p for _ in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_paired_difference_of_few_or_equal_values():
    assert math.isnan(paired_difference([0.5], [0.4]).p) and math.isnan(paired_difference([], []).p)
    same = paired_difference([0.5, 0.6], [0.5, 0.6])
    assert (same.mean, same.error, same.p) == (0.0, 0.0, 1.0)
    known = paired_difference([1.0, 2.0, 4.0], [0.0, 0.0, 1.0])  # differences 1, 2, 3: t = 2·sqrt(3) on 2 degrees
    assert known.mean == 2 and known.error == pytest.approx(1 / 3**0.5) and known.p == pytest.approx(0.0741799)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.9])[::2] == [1.0, 1.0] and holm([]) == []


def test_the_table_holds_the_planted_effect_and_not_a_null():
    rng = np.random.default_rng(2)
    better, base = two_methods(0.03, rng)
    null = base + rng.normal(0, 0.01, 10)
    rows = {
        name: {seed: planted(float(value)) for seed, value in enumerate(values)}
        for name, values in (("base", base), ("better", better), ("null", null))
    }
    del rows["null"][9]
    printed = table(rows, {"better": "base", "null": "base"})
    cells = {line.split(" | ")[0].lstrip("| "): [c.strip() for c in line.split("|")] for line in printed.splitlines()}
    heading = cells[""]
    found = {name: dict(zip(heading, cells[name], strict=True)) for name in rows}
    assert found["base"]["difference"] == "" and found["null"]["n"] == "9"
    difference, error = map(float, found["better"]["difference"].split(" ± "))
    assert abs(difference - 3) < 3 * error < 3
    p = {name: float(found[name]["p"]) for name in ("better", "null")}
    assert p["better"] < 0.001 < 0.05 < p["null"]
    assert float(found["better"]["p (Holm)"]) == pytest.approx(2 * p["better"], rel=0.1)
    mean, spread = map(float, found["base"]["accuracy, %"].split(" ± "))
    assert mean == pytest.approx(100 * base.mean(), abs=0.06)
    assert spread == pytest.approx(100 * base.std(ddof=1) / 10**0.5, abs=0.06)


# --- data -----------------------------------------------------------------------------------------------------------


def test_flipped_labels_are_drawn_by_the_seed_alone():
    labels = ["a", "b", "c"]
    examples = [Example(f"text {i}", labels[i % 3]) for i in range(90)]
    many, wrong = flip_labels(examples, 0.4, labels, 3)
    few, wrong_few = flip_labels(examples, 0.2, labels, 3)
    assert sum(wrong) == 36 and sum(wrong_few) == 18
    for example, given, is_wrong in zip(examples, many, wrong, strict=True):
        assert given.text == example.text and (given.label != example.label) == is_wrong
    assert all(w and few[i] == many[i] for i, w in enumerate(wrong) if wrong_few[i])
    assert flip_labels(examples, 0.4, labels, 3) == (many, wrong) != flip_labels(examples, 0.4, labels, 4)
    to = [given.label for example, given in zip(examples, many, strict=True) if example.label == "a" != given.label]
    assert set(to) == {"b", "c"}


def test_every_method_of_a_seed_gets_the_same_flipped_labels(files, task, monkeypatch):
    seen = {}

    def watch(fit, run, scored):
        texts = [tuple(row.tolist()) for batches in fit.epochs for batch in batches for row in batch["input_ids"]]
        labels = [int(label) for batches in fit.epochs for batch in batches for label in batch["labels"]]
        seen[run.method] = list(zip(texts, labels, strict=True))
        raise InterruptedError

    monkeypatch.setattr(runs_module, "train", watch)
    for method in METHODS:
        with pytest.raises(InterruptedError):
            execute(a_run(files, task, method), task)
    clean = {example.text: example.label for example in task.texts.data.pool}
    given = training_data(task.texts.data, 32, 0.25, 0.0, 0)
    assert sum(clean[example.text] != example.label for example in given.examples) == 8 == sum(given.wrong)
    for method, pairs in seen.items():
        if METHODS[method].stops_early:  # trains on a part of the same examples
            assert set(pairs) < set(seen["lora"])
        else:
            assert pairs == seen["lora"]


def test_validation_examples_are_training_examples_with_their_wrong_labels(task):
    whole = training_data(task.texts.data, 32, 0.25, 0.0, 0)
    split = training_data(task.texts.data, 32, 0.25, 0.25, 0)
    assert len(split.validation) == 8 and len(split.examples) == 24
    assert {*split.validation, *split.examples} == set(whole.examples)
    clean = {example.text: example.label for example in task.texts.data.pool}
    assert sum(clean[e.text] != e.label for e in split.validation) == 8 - sum(split.wrong) > 0


def test_a_data_set_of_the_datasets_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for split, n in (("train", 12), ("test", 6)):
        rows = "\n".join(f"{split} text {i},{i % 2}" for i in range(n))
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")
    data = load_named(str(tmp_path))
    assert (len(data.pool), len(data.held_out), data.labels) == (12, 6, ["0", "1"])
    assert data.pool[1] == Example("train text 1", "1")


# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [4, 5, 6])
def test_every_method_has_the_same_budget(budget):
    for method in METHODS:
        settings = compare.candidates(method, budget)
        assert len(set(settings)) == budget
        assert {setting.strength for setting in settings} == set(METHODS[method].strengths or (0.0,))


def test_the_choice_follows_validation_and_not_the_test(files, task, tmp_path):
    args = compare.parse_arguments(arguments(files, "--tune", 4, "--tune-seeds", 2, "--report-only"))
    regime = compare.regimes(args, task.texts.name)[0]
    with Store(tmp_path / "results.jsonl") as store:
        for i, setting in enumerate(compare.candidates("ggpo", 4)):
            for seed in (0, 1):
                tuning = {"validation_accuracy": 0.9 if i == 2 else 0.5, "validation_loss": 1.0, "curve": []}
                store.add(compare.of(regime, setting, seed, True), tuning)
                store.add(compare.of(regime, setting, seed), planted(0.9 - 0.1 * i))
        assert compare.tuned(regime, ["ggpo"], store, args) == [compare.candidates("ggpo", 4)[2]]


@pytest.mark.parametrize("method", ["lora", "early-stopping"])
def test_a_tuning_run_never_sees_the_test_data(method, files, task, monkeypatch):
    seen = []
    monkeypatch.setattr(runs_module, "encode", lambda examples, *more: seen.extend(examples) or encode(examples, *more))
    result = execute(a_run(files, task, method, tuning=True), task)
    assert seen and not {example.text for example in seen} & {example.text for example in task.texts.data.held_out}
    points = [(point["validation_accuracy"], -point["validation_loss"]) for point in result["curve"]]
    chosen = max(points) if method == "early-stopping" else points[-1]
    assert (result["validation_accuracy"], -result["validation_loss"]) == chosen and "accuracy" not in result


def test_tuning_from_end_to_end(files, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    wanted = arguments(files, "--runs", "lora", "early-stopping", "--tune", 2, "--tune-seeds", 1, "--seeds", 0)
    monkeypatch.setattr(sys, "argv", ["compare.py", *wanted, "--results", str(path)])
    compare.main()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["run"]["tuning"] for entry in entries] == [True] * 4 + [False] * 2
    for method, final in zip(("lora", "early-stopping"), entries[4:], strict=True):
        tuning = [entry for entry in entries[:4] if entry["run"]["method"] == method]
        best = max(tuning, key=lambda e: (e["result"]["validation_accuracy"], -e["result"]["validation_loss"]))
        assert final["run"]["lr"] == best["run"]["lr"]
    printed = capsys.readouterr().out
    assert "LoRA, early stopping, lr" in printed and "25 % wrong labels" in printed


def test_what_is_compared_with_what():
    low, high = compare.Setting("lora", 0.0, 1e-4), compare.Setting("lora", 0.0, 1e-3)
    noisy, alone = compare.Setting("ggpo", 0.2, 1e-3), compare.Setting("ggpo", 0.2, 5e-4)
    every = [low, high, noisy, alone]
    assert compare.baselines_of(every, compare.parse_arguments([])) == {noisy: high}
    fixed = compare.parse_arguments(["--baseline-lr", "1e-4"])
    assert compare.baselines_of(every, fixed) == {high: low, noisy: low, alone: low}
    assert compare.baselines_of([noisy, high], compare.parse_arguments(["--tune", "2"])) == {noisy: high}
    with pytest.raises(SystemExit, match="LoRA has results at"):
        compare.baselines_of([high], fixed)


def test_runs_are_parsed():
    assert compare.parse_settings("ggpo:0.3@1e-3,5e-4", []) == [
        compare.Setting("ggpo", 0.3, 1e-3),
        compare.Setting("ggpo", 0.3, 5e-4),
    ]
    assert compare.parse_settings("lora", [2e-4]) == [compare.Setting("lora", 0.0, 2e-4)]
    for wrong in ("lara", "lora:0.2", "ggpo@x"):
        with pytest.raises(SystemExit, match=f"error: --runs {wrong}"):
            compare.parse_settings(wrong, [1e-3])
    assert compare.seed_range("2-4,7") == [2, 3, 4, 7]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(files, task):
    """The result of a method on correct labels, made once."""

    @functools.cache
    def result(method):
        lr = 4e-3 if method == "ivon" else 1e-2  # its clipped steps are all of one length
        return execute(a_run(files, task, method, flip=0.0, examples=64, epochs=6, batch_size=8, lr=lr), task)

    return result


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method, task, learnt):
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    before = {name: p.clone() for name, p in task.base.named_parameters()}
    result = learnt(method)
    assert result["accuracy"] > 0.9 and len(result["curve"]) == 6 and math.isfinite(result["rise"])
    assert all(torch.equal(p, before[name]) for name, p in task.base.named_parameters())


def test_methods_are_what_they_are_called(learnt):
    ends = {name: learnt(name)["loss"] for name, method in METHODS.items() if method.loop.__name__ == "ordinary"}
    assert ends.pop("peft-gralora") == pytest.approx(ends["gralora"], rel=1e-3)  # one initialisation, one method
    assert ends.pop("flat-lora") == pytest.approx(ends["ggpo"], rel=0.05)  # β·‖G‖² is next to nothing
    assert len({round(loss, 6) for loss in ends.values()}) == len(ends)


def test_the_linear_schedule_ends_at_zero(files, task, monkeypatch):
    fits = []
    monkeypatch.setattr(runs_module, "train", lambda fit, run, scored: fits.append(fit) or train(fit, run, scored))
    results = {name: execute(a_run(files, task, schedule=name), task) for name in ("constant", "linear")}
    assert results["constant"]["loss"] != results["linear"]["loss"]
    assert fits[0].scheduler is None and fits[1].scheduler.get_last_lr() == [0.0]


def test_early_stopping_ends_with_its_best_epoch(files, task, monkeypatch):
    accuracies, epoch, ids = iter([0.3, 0.9, 0.5, 0.9]), runs_module.Scored.epoch, task.batches(task.texts.data.pool)
    outputs = []

    def planned(self, model):
        outputs.append(torch.cat([model(**batch).logits for batch in ids]))
        return epoch(self, model) | {"validation_accuracy": next(accuracies), "validation_loss": 1.0}

    monkeypatch.setattr(runs_module.Scored, "epoch", planned)
    result = execute(a_run(files, task, "early-stopping", epochs=4, flip=0.4, lr=1e-2), task)
    losses = [point["loss"] for point in result["curve"]]
    assert result["loss"] == losses[1] and len(set(losses)) == 4
    training = training_data(task.texts.data, 32, 0.4, 0.2, 0)
    given = {example.text: task.texts.data.labels.index(example.label) for example in training.examples}
    wrong = {e.text for e, is_wrong in zip(training.examples, training.wrong, strict=True) if is_wrong}
    texts = [e.text for e in sorted(task.texts.data.pool, key=lambda e: len(task.rows([e])[0]["input_ids"]))]
    learnt = [int(row.argmax()) == given[text] for text, row in zip(texts, outputs[1], strict=True) if text in wrong]
    assert result["memorised"] == pytest.approx(sum(learnt) / len(learnt))


def test_the_average_of_the_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    average, values = Average(model, moving(0.5, 3)), [1.0, 2.0, 4.0]
    expected = model.weight.item()
    for step, value in enumerate(values, 1):
        torch.nn.init.constant_(model.weight, value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.used():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0


def test_swa_is_the_mean_of_the_last_share_of_a_run():
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, last(0.4, 5))
    for value in (7.0, 9.0, 5.0, 1.0, 2.0):
        torch.nn.init.constant_(model.weight, value)
        average.update()
    assert average.means[0].item() == pytest.approx(1.5)


def test_one_pass_sam_is_its_formula():
    """Two steps of SGD on ``w⁴/4`` by hand: the second gradient is taken ρ further on."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    fit = Fit(model, lambda model, lr, rho: torch.optim.SGD(model.parameters(), lr=lr), 0.01, 0.5, [[{}, {}]])
    fit.loss = lambda batch: model.weight.pow(4).sum() / 4
    list(one_pass_sam(last_gradient)(fit))
    w = 2.0 - 0.01 * 2.0**3
    assert model.weight.item() == pytest.approx(w - 0.01 * (w + 0.5) ** 3)


def test_a_radius_follows_its_rule(task, files):
    model = fresh_model(task.base, METHODS["lora"], 0.0, 8, 0)
    training = training_data(task.texts.data, 32, 0.0, 0.0, 0)
    run = a_run(files, task, examples=32, epochs=2)
    seen = []

    def rule(radius, strength):
        deltas = [
            module.get_delta_weight("default") for module in model.modules() if hasattr(module, "get_delta_weight")
        ]
        seen.append((radius.update, float(torch.cat([delta.flatten() for delta in deltas]).norm())))
        return strength * radius.update

    fit = Fit(model, METHODS["lora"].optimizer, 1e-2, 0.1, runs_module.epochs_of(run, task, training))
    list(with_radius(rule)(fit))
    before, after = (torch.tensor(norms) for norms in zip(*seen, strict=True))
    torch.testing.assert_close(before[1:], after[:-1])  # of the weights that the step began with
    assert before[0] == 0 and after[-1] > 0


def test_the_new_part_of_a_gradient_steers_lorasam_alone(task, files):
    """Gradients that are all alike have none: the run is LoRA's own. With others ε begins after the second step."""
    training = training_data(task.texts.data, 32, 0.0, 0.0, 0)
    epochs = runs_module.epochs_of(a_run(files, task, examples=32, epochs=1, batch_size=8), task, training)[0][:2]

    def steps(loop, batches, fixed):
        model = fresh_model(task.base, METHODS["lora"], 0.0, 8, 0)
        fit = Fit(model, METHODS["lora"].optimizer, 1e-2, 0.5, [batches])
        if fixed:  # gradients that are the same at every step
            slopes = [torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for p in trainable(model)]
            fit.loss = lambda batch: sum((p * slope).sum() for p, slope in zip(trainable(model), slopes, strict=True))
        list(loop(fit))
        return torch.cat([p.detach().flatten() for p in trainable(model)])

    ordinary, new = METHODS["lora"].loop, against_the_new
    assert torch.equal(steps(ordinary, [{}] * 4, True), steps(new, [{}] * 4, True))
    torch.testing.assert_close(steps(ordinary, epochs, False), steps(new, epochs, False))  # ε is zero in two passes
    difference = steps(ordinary, [*epochs, epochs[0]], False) - steps(new, [*epochs, epochs[0]], False)
    assert difference.abs().max() > 1e-3


def test_pairs_of_noise_cancel_where_the_gradient_is_linear_in_the_weight():
    """With both halves alike and a squared error, the run is LoRA's own; noise on one side alone makes another."""
    x, y = (torch.randn(4, size, generator=torch.Generator().manual_seed(size)) for size in (6, 5))
    batch = {"x": x.repeat_interleave(2, 0), "labels": y.repeat_interleave(2, 0)}

    def trained(method, loop):
        torch.manual_seed(0)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(target_modules=["0"], r=2))
        fit = Fit(model, METHODS[method].optimizer, 1e-2, 0.5, [[batch] * 4])
        fit.loss = lambda half: (model(half["x"]) - half["labels"]).square().mean()
        list(loop(fit))
        return torch.cat([p.detach().flatten() for p in trainable(model)])

    plain = trained("lora", METHODS["lora"].loop)
    torch.testing.assert_close(trained("ggpo-pairs", in_pairs), plain)
    assert (trained("ggpo-pairs", METHODS["lora"].loop) - plain).abs().max() > 1e-3


def test_calibration_and_correlation():
    logits = torch.tensor([[0.8, 0.2]] * 10).log()
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert calibration_error(logits, labels) == pytest.approx(0.2, abs=1e-6)
    assert calibration_error(logits, torch.tensor([0] * 8 + [1] * 2)) == pytest.approx(0.0, abs=1e-6)
    predicted, truth = torch.tensor([0, 1, 1, 0, 1, 1]), torch.tensor([0, 1, 0, 0, 1, 0])
    assert matthews(predicted, truth) == pytest.approx(float(np.corrcoef(predicted, truth)[0, 1]))
    assert matthews(truth, truth) == pytest.approx(1) and matthews(torch.zeros(3, dtype=int), truth[:3]) == 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_rounded_weights_are_those_of_the_layers_of_bitsandbytes(kind):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 96, bias=False), torch.eye(64)
    model = torch.nn.ModuleDict({"fc": layer, "classifier": copy.deepcopy(layer)})
    found = rounded(model, kind)
    assert torch.equal(found["classifier"].weight, layer.weight) and torch.equal(model["fc"].weight, layer.weight)
    with torch.no_grad():
        expected = quantised(layer, kind)(x).float().t()
    close = {"rtol": 1e-3, "atol": 1e-5} if kind == "nf4" else {"rtol": 0.01, "atol": 2e-3}
    torch.testing.assert_close(found["fc"].weight, expected, **close)
    assert not torch.equal(found["fc"].weight, layer.weight)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(files, tmp_path_factory):
    """A tiny Llama whose tokenizer knows the labels' names and the end of a text."""
    folder = tmp_path_factory.mktemp("decoder")
    words = ["[PAD]", "[UNK]", "</s>", "0", "1", "Topic", ":", "the", "was", *GOOD, *BAD, *NOUNS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = llama(32, num_key_value_heads=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
        model.lm_head.weight.normal_()
    model.save_pretrained(folder)
    return folder


def generating(files, decoder, *more):
    wanted = arguments(files, "--generate", *more)
    wanted[wanted.index("--model") + 1] = str(decoder)
    return wanted


def test_exact_match_is_that_of_greedy_generation(files, decoder):
    args = compare.parse_arguments(generating(files, decoder))
    task = load_task(args)
    run = dataclasses.replace(a_run(files, task, flip=0.0), examples=64, epochs=3, lr=1e-2, task="generate")
    model = fresh_model(task.base, METHODS["lora"], 0.0, 8, 0)
    training = training_data(task.texts.data, 64, 0.0, 0.0, 0)
    fit = Fit(model, METHODS["lora"].optimizer, 1e-2, 0.0, runs_module.epochs_of(run, task, training))
    some = [*task.texts.data.held_out[:30], Example("good", "1")]  # of two lengths: padded
    scores = []
    for _ in METHODS["lora"].loop(fit):
        model.eval()
        right, loss, tokens = 0, 0.0, 0
        for row in task.rows(some):
            ids, answer = torch.tensor([row["input_ids"]]), row["labels"]
            prompt = ids[:, : -len(answer)]
            ones = torch.ones_like(prompt)
            with torch.no_grad():
                written = model.generate(
                    input_ids=prompt,
                    attention_mask=ones,
                    max_new_tokens=len(answer),
                    do_sample=False,
                    eos_token_id=2,
                    pad_token_id=0,
                )
                logits = model(input_ids=ids).logits[0, -len(answer) - 1 : -1]
            right += written[0, prompt.shape[1] :].tolist() == answer
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            tokens += len(answer)
        found = score(model, task.batches(some, 8))
        assert found == pytest.approx({"accuracy": right / len(some), "loss": loss / tokens}, rel=1e-4)
        scores.append(found["accuracy"])
    assert scores[-1] > 0.5


@pytest.mark.parametrize("method", ["lora", "gralora", "ggpo", "bilora", "lorasam", "bidora", "neftune"])
def test_methods_learn_to_generate(method, files, decoder):
    task = load_task(compare.parse_arguments(generating(files, decoder)))
    run = a_run(files, task, method, lr=1e-2, examples=64, epochs=3, task="generate")
    untrained = score(fresh_model(task.base, METHODS[method], 0.0, 4, 0), task.batches(task.texts.data.held_out))
    result = execute(run, task)
    assert result["loss"] < untrained["loss"] - 1
    assert 0 <= result["memorised"] <= 1 and math.isfinite(result["rise"]) and "ece" not in result


def test_a_comparison_of_generation_from_end_to_end(files, decoder, tmp_path, monkeypatch, capsys):
    more = ("--runs", "lora", "--seeds", "0-1", "--then", "quantise", "--results", tmp_path / "results.jsonl")
    monkeypatch.setattr(sys, "argv", ["compare.py", *generating(files, decoder, *more)])
    compare.main()
    printed = capsys.readouterr().out
    assert "labels generated" in printed and "nf4: change of loss" in printed and "ECE" not in printed
    with pytest.raises(SystemExit):
        compare.parse_arguments(generating(files, decoder, "--measure", "matthews"))
