"""What examples/research/compare.py measures of an adapter after its training, and comparisons that are killed."""

# ruff: noqa: F401, F811  (fixtures are imported)

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples" / "research"
sys.path.insert(0, str(EXAMPLES))

import compare  # noqa: E402
from comparing import after  # noqa: E402
from comparing.after import (  # noqa: E402
    AFTER,
    execute_all,
    over,
    swap_head,
    weighted,
    windows,
)
from comparing.methods import METHODS, add_adapter, fresh_model  # noqa: E402
from comparing.quantised import ROUNDINGS, merged, rounded, to_nearest  # noqa: E402
from comparing.report import Figure, figures_table, holm, paired_difference  # noqa: E402
from comparing.runs import load_task, trained  # noqa: E402
from comparing.scoring import agreement, auroc, calibration, score, temperature  # noqa: E402
from comparing.store import Store  # noqa: E402
from processes import start_script  # noqa: E402
from test_compare import (  # noqa: E402
    BAD,
    GOOD,
    NOUNS,
    PACKAGES,
    arguments,
    decoder,
    files,
    generating,
    wait_for,
    without_times,
)

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def second(files):
    """Another task on the same model: which half of the nouns a sentence has; three labels."""
    lines = [f"{i % 3}\tthe {noun} was {word}" for i, noun in enumerate(NOUNS) for word in GOOD[:2] + BAD[:2]]
    for name, part in (("second", lines[::2]), ("second_test", lines[1::2])):
        (files / f"{name}.tsv").write_text("\n".join(["label\tsentence", *part]), encoding="utf-8")
    return ["--second-file", str(files / "second.tsv"), "--second-test-file", str(files / "second_test.tsv")]


@pytest.fixture(scope="module")
def args(files, second):
    return compare.parse_arguments(
        arguments(files, "--then", *(set(AFTER) - {"general"}), *second, "--second-steps", 8)
    )


@pytest.fixture(scope="module")
def task(args):
    return load_task(args)


def runs_of(args, task, method="lora", **changes):
    """The scores of a run, and each of its other measures."""
    regime = compare.regimes(args, task.texts.name)[0]
    strength = (METHODS[method].strengths or (0.0,))[0]
    setting = compare.Setting(method, strength, 3e-3)
    return [dataclasses.replace(compare.of(run, setting, 0), **changes) for run in compare.afterwards(regime, args)]


# --- every measure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_measures_of_every_method_do_not_depend_on_each_other(method, args, task):
    """They leave the model as it was: measured together, in any order, or alone, the figures are the same."""
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    runs = [run for run in runs_of(args, task, method) if run.then != "add" or METHODS[method].adapter == "lora"]
    together = dict(zip(runs, map(without_times, execute_all(runs, task)), strict=True))
    backwards = dict(zip(runs[::-1], map(without_times, execute_all(runs[::-1], task)), strict=True))
    assert together == backwards
    for run, result in together.items():
        for figure in AFTER[run.then].figures if run.then else ():
            missing = figure.name.endswith("_forgotten")  # an encoder has no loss on general text
            assert missing or math.isfinite(result[figure.name]), (run.then, figure.name)


def test_a_measure_alone_is_as_with_the_others(args, task):
    runs = runs_of(args, task, "lorasam")
    every = execute_all(runs, task)
    for run, result in zip(runs, every, strict=True):
        assert without_times(execute_all([run], task)[0]) == without_times(result)


def test_measures_that_leave_nothing_to_measure_are_refused(files, second, capsys):
    for wrong, said in (
        (["--then", "general"], "needs --generate"),
        (["--then", "detect", "--flip", 0.2, 0], "looks for wrong labels"),
        (["--then", "add"], "need --second-file, a second task"),
        (["--then", "detect", *second], "nothing else takes one"),
        (["--then", "sequence", *second, "--second-steps", 6], "must be a multiple of 4"),
        (["--then", "add", *second, "--runs", "lora", "dora@1e-3", "gralora"], "not those of dora, gralora"),
        (["--then", "flying"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            compare.parse_arguments(arguments(files, *wrong))
        assert said in capsys.readouterr().err


# --- resuming -------------------------------------------------------------------------------------------------------


def test_a_measure_added_later_repeats_no_other(files, second, tmp_path, monkeypatch, capsys):
    path, made = tmp_path / "results.jsonl", []
    results_of = compare.results_of
    monkeypatch.setattr(compare, "results_of", lambda runs, args: made.extend(runs) or results_of(runs, args))

    def compared(*more):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments(files, *more, "--seeds", "0-1", "--results", path)])
        compare.main()
        return [run.then for run in made]

    assert compared("--runs", "lora") == ["", ""]
    assert compared("--runs", "lora", "ggpo", "--then", "detect") == ["detect", "", "detect"] * 2
    before = path.read_bytes()
    assert compared("--runs", "lora", "ggpo", "--then", "sequence", "detect", *second) == ["sequence"] * 4
    assert path.read_bytes().startswith(before)
    printed = capsys.readouterr().out
    assert "#### detect" in printed and "AUROC of the loss" in printed and "second task, %" in printed
    assert compared("--runs", "lora", "--then", "sequence", *second, "--report-only") == []


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_comparison_goes_on_without_losing_or_repeating_a_run(files, tmp_path, monkeypatch, capsys):
    wanted = arguments(files, "--runs", "lora", "ggpo", "--seeds", "0-4", "--results")
    killed, straight = tmp_path / "killed.jsonl", tmp_path / "straight.jsonl"
    process = start_script(EXAMPLES / "compare.py", *wanted, killed, "--processes", 2)
    wait_for(lambda: not process.is_alive() or (killed.exists() and killed.read_bytes().count(b"\n") >= 2))
    workers = children(process.pid)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and workers
    wait_for(lambda: not any(map(is_alive, workers)))
    before = killed.read_bytes()
    assert 2 <= before.count(b"\n") < 10
    killed.write_bytes(before + b'{"run": {"data": "torn')

    for path in (killed, straight):
        monkeypatch.setattr(sys, "argv", ["compare.py", *wanted, str(path)])
        compare.main()
        assert "LoRA, lr 0.003 | 5 |" in capsys.readouterr().out
    assert killed.read_bytes().startswith(before)
    entries = [json.loads(line) for line in killed.read_text().splitlines()]
    keys = [json.dumps(entry["run"], sort_keys=True) for entry in entries]
    assert len(keys) == len(set(keys)) == 10
    with Store(straight) as whole:
        assert set(keys) == set(whole.results)
        for key, entry in zip(keys, entries, strict=True):
            assert without_times(entry["result"]) == without_times(whole.results[key])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by SIGKILL")
def test_measures_of_a_killed_comparison_go_on(files, tmp_path, monkeypatch):
    """Whether it dies between two trainings or while it writes a measure of one of them."""
    wanted = arguments(files, "--runs", "lora", "--seeds", "0-4", "--then", "quantise", "detect", "--results")
    path, straight = tmp_path / "killed.jsonl", tmp_path / "straight.jsonl"
    process = start_script(EXAMPLES / "compare.py", *wanted, path)
    wait_for(lambda: not process.is_alive() or (path.exists() and path.read_bytes().count(b"\n") >= 3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    lines = path.read_bytes().splitlines(keepends=True)
    assert 3 <= len(lines) < 15
    path.write_bytes(
        b"".join(lines[:2]) + lines[2][:50]
    )  # as if it had died while it wrote the last of the first three
    for each in (path, straight):
        monkeypatch.setattr(sys, "argv", ["compare.py", *wanted, str(each)])
        compare.main()
    assert path.read_bytes().startswith(b"".join(lines[:2]))
    with Store(path) as killed, Store(straight) as whole:
        assert killed.results.keys() == whole.results.keys() and len(whole.results) == 15
        for key, result in whole.results.items():
            assert without_times(killed.results[key]) == without_times(result)
    assert path.read_bytes().count(b"\n") == 15  # none was made twice


# --- statistics -----------------------------------------------------------------------------------------------------


def planted(effects, rng, n=8, figures=5):
    """Figures of a baseline and of methods with these effects, whose seeds differ by more than the methods do."""
    seeds = rng.normal(0, 1, (n, figures))
    names = ["base", *map(str, effects)]
    return {
        name: {i: {f"f{j}": float(seeds[i, j] + effect + rng.normal(0, 0.2)) for j in range(figures)} for i in range(n)}
        for name, effect in zip(names, (0.0, *effects), strict=True)
    }


def cells_of(printed):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    return [dict(zip(["figure", "row", *lines[0][2:]], line, strict=True)) for line in lines[2:]]


FIGURES = [Figure(f"figure {j}", f"f{j}", 1, ".3f") for j in range(5)]


def test_planted_effects_are_found_in_the_table():
    rows = planted((1.0, -1.0, 0.0), np.random.default_rng(0))
    cells = cells_of(figures_table(rows, dict.fromkeys(list(rows)[1:], "base"), FIGURES))
    assert len(cells) == 20 and all(cell["difference"] == "" for cell in cells if cell["row"] == "base")
    for cell in cells:
        if cell["row"] != "base":
            difference, error = map(float, cell["difference"].split(" ± "))
            assert abs(difference - float(cell["row"])) < 6 * error
            assert (float(cell["p (Holm)"]) < 0.05) == (cell["row"] != "0.0")
    p = [float(cell["p"]) for cell in cells if cell["p"]]
    assert [float(c["p (Holm)"]) for c in cells if c["p"]] == pytest.approx(holm(p), rel=0.1)


def test_planted_nulls_are_found_in_no_more_tables_than_five_in_a_hundred():
    """The chance that a table of fifteen comparisons without any effect has a single one below 0.05 after Holm."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(100):
        rows = planted((0.0, 0.0, 0.0), rng)
        p = [
            paired_difference([r[f] for r in rows[name].values()], [r[f] for r in rows["base"].values()]).p
            for name in list(rows)[1:]
            for f in ("f0", "f1", "f2", "f3", "f4")
        ]
        found += min(holm(p)) < 0.05
    assert found <= 11  # of a binomial with 100 draws of 0.05: more comes once in 200 times


def test_figures_against_zero_and_of_missing_seeds():
    rng = np.random.default_rng(2)
    rows = {
        "base": {i: {"gain": float(0.5 + rng.normal(0, 0.1))} for i in range(8)},
        "other": {3: {"gain": 1.0}, 4: {}},
    }
    (base, other) = cells_of(figures_table(rows, {"other": "base"}, [Figure("gain", "gain", 1, ".3f", True)]))
    assert base["against"] == "zero" and float(base["p"]) < 1e-4 and other["n"] == "1" and other["p"] == ""
    (base, other) = cells_of(figures_table(rows, {"other": "base"}, [Figure("gain", "gain", 1, ".3f")]))
    assert base["difference"] == other["difference"] == ""


# --- calibration ----------------------------------------------------------------------------------------------------


def drawn(n, scale, seed=0):
    """Logits, and labels drawn from what the logits divided by `scale` say."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits * scale, labels


def test_the_temperature_is_the_best_one():
    from scipy.optimize import minimize_scalar

    for scale in (0.3, 1.0, 5.0):
        logits, labels = drawn(4000, scale)

        def loss(t, logits=logits, labels=labels):
            return float(torch.nn.functional.cross_entropy(logits.double() / t, labels))

        best = minimize_scalar(loss, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-8}).x
        assert temperature(logits, labels) == pytest.approx(best, rel=1e-4)
        assert temperature(logits, labels) == pytest.approx(scale, rel=0.1)


def test_temperature_scaling_repairs_overconfidence_and_nothing_else():
    found = calibration(*drawn(4000, 5.0))
    assert found["ece"] > 0.15 and found["scaled_ece"] < 0.03
    logits, labels = drawn(4000, 1.0)
    mixed = torch.cat([logits * 8, logits / 8])  # half of the texts too sure, half too little: no temperature helps
    order = torch.randperm(8000, generator=torch.Generator().manual_seed(0))
    assert calibration(mixed[order], labels.repeat(2)[order])["scaled_ece"] > 0.05


def test_brier_score_and_coverage_against_plain_loops():
    logits, labels = drawn(101, 2.0)
    found, p = calibration(logits, labels), logits.double().softmax(-1).tolist()
    brier = sum(sum((q - (j == y)) ** 2 for j, q in enumerate(row)) for row, y in zip(p, labels.tolist(), strict=True))
    assert found["brier"] == pytest.approx(brier / 101)
    surest = sorted(range(101), key=lambda i: -max(p[i]))[:81]
    right = [max(range(4), key=p[i].__getitem__) == labels[i] for i in surest]
    assert found["covered_accuracy"] == pytest.approx(sum(map(bool, right)) / 81)
    assert "scaled_ece" not in calibration(logits[:1], labels[:1])


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [32, 64])
def test_rounding_to_nearest_against_a_plain_formula(bits, group):
    torch.manual_seed(0)
    weight = torch.randn(5, 80)
    weight[1] = weight[1].abs() + 1  # no zero among them
    weight[2, :64] = 0.0
    expected = weight.clone()
    for row in range(5):
        for start in range(0, 80, group):
            part = [float(w) for w in weight[row, start : start + group]]
            low, high = min(*part, 0.0), max(*part, 0.0)
            scale = (high - low) / (2**bits - 1) or 1.0
            for i, w in enumerate(part):
                code = min(max(round(w / scale) + round(-low / scale), 0), 2**bits - 1)
                expected[row, start + i] = scale * (code - round(-low / scale))
    found = to_nearest(weight, bits, group)
    torch.testing.assert_close(found, expected)
    for row in range(5):
        for start in range(0, 80, group):
            assert len(found[row, start : start + group].unique()) <= 2**bits
    assert (found - weight).abs().max() > 0 and torch.equal(found[2, :64], weight[2, :64])


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_by_hqq_fits_no_worse_than_to_nearest(bits):
    """By the norm of power 0.7 that its zero points are fitted by."""
    pytest.importorskip("hqq")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    found = ROUNDINGS[f"hqq{bits}_64"](weight)
    assert torch.equal(weight, before) and found.shape == weight.shape and found.dtype == weight.dtype
    assert all(len(group.unique()) <= 2**bits for group in found.reshape(-1, 64))
    errors = [(rounding - weight).abs().pow(0.7).mean() for rounding in (found, to_nearest(weight, bits, 64))]
    assert 0 < errors[0] < errors[1]


def test_fewer_bits_cost_more_and_answers_are_compared(args, task):
    (run,) = (run for run in runs_of(args, task, flip=0.0, examples=64, epochs=6, lr=1e-2) if run.then == "quantise")
    plain, found = execute_all([run.training, run], task)
    assert found["merged_accuracy"] == plain["accuracy"] and found["merged_loss"] == pytest.approx(plain["loss"])
    change = {kind: abs(found[f"{kind}_loss_change"]) for kind in ("int8", "rtn4_32", "rtn3_32")}
    assert all(0 < one < 0.5 for one in change.values())
    weights = dict(task.base.named_parameters())
    moved = {
        kind: sum((p - weights[name]).abs().sum() for name, p in rounded(task.base, kind).named_parameters()).item()
        for kind in ("int8", "rtn4_32", "rtn3_32")
    }
    assert 0 < moved["int8"] < moved["rtn4_32"] < moved["rtn3_32"]
    assert found["rtn3_64_loss"] - found["merged_loss"] == found["rtn3_64_loss_change"]
    assert found["int8_agreement"] >= found["rtn3_64_agreement"] > 0.5
    a, b = [torch.tensor([[1], [2]]), torch.tensor([[3]])], [torch.tensor([[1], [0]]), torch.tensor([[3]])]
    assert agreement(a, b) == pytest.approx(2 / 3) and agreement(a, a) == 1


# --- merging --------------------------------------------------------------------------------------------------------


def test_adapters_over_another_base_are_those_of_peft_over_it(task):
    """The NF4 base: over its weights PEFT's own forward, with the adapter's factors and head put there."""
    model = fresh_model(task.base, METHODS["lora"], 0.0, 4, 0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    base = rounded(task.base, "nf4")
    expected = add_adapter(copy.deepcopy(base), "lora", 4)
    expected.load_state_dict({n: p for n, p in model.named_parameters() if p.requires_grad}, strict=False)
    batches = task.batches(task.texts.data.held_out)
    found = score(over(base, model), batches)
    assert found == score(expected, batches) != score(model, batches)
    assert score(over(task.base, over(base, model)), batches) == score(model, batches)


def test_merging_over_the_other_base(args, task):
    (run,) = (run for run in runs_of(args, task, examples=64, epochs=4, lr=1e-2) if run.then == "merge")
    plain, found = execute_all([run.training, run], task)
    assert found["float_on_float_loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["nf4_on_nf4_loss"] != found["nf4_on_float_loss"] != found["float_on_float_loss"]
    assert found["nf4_loss_change"] == pytest.approx(found["nf4_on_float_loss"] - found["nf4_on_nf4_loss"])


# --- scaled back ----------------------------------------------------------------------------------------------------


def test_an_adapter_scaled_back_is_one_of_lower_alpha(args, task):
    """Half of what LoRA changed is PEFT's own adapter with half its scaling; the whole is the merged model."""
    model = trained(runs_of(args, task, lr=1e-2)[0], task).model
    whole = merged(model)
    for factor in (1.0, 0.5, 0.0):
        expected = copy.deepcopy(model)
        for module in expected.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= factor
        found = dict(after.scaled(task.base, whole, factor).named_parameters())
        for name, p in merged(expected).named_parameters():
            torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-6)


def test_scores_of_an_adapter_scaled_back(args, task):
    (run,) = (run for run in runs_of(args, task, flip=0.0, examples=64, epochs=4, lr=1e-2) if run.then == "scale")
    plain, found = execute_all([run.training, run], task)
    assert found["x1_loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["x0.25_loss"] > found["x0.5_loss"] > found["x1_loss"]  # of clean labels, the more the better
    assert found["x0.5_loss_change"] == pytest.approx(found["x0.5_loss"] - found["x1_loss"])
    assert not any("forgotten" in name for name in found)


# --- two tasks ------------------------------------------------------------------------------------------------------


def test_the_sum_is_that_of_peft(args, task):
    """PEFT's concatenation of two adapters is the exact sum of what they change."""
    run = runs_of(args, task, lr=1e-2)[0]
    one, other = trained(run, task).model, trained(run, task.second).model
    found = after.summed(task.base, merged(one), merged(other))
    expected = weighted(one, other, "cat", 0)
    named = dict(expected.named_parameters())
    for name, p in found.named_parameters():
        if not name.startswith("classifier"):
            torch.testing.assert_close(p, named[name], rtol=1e-4, atol=1e-5)
    linear = dict(weighted(one, other, "linear", 0).named_parameters())
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    for name in (n for n in a if "query" in n and "lora_A" in n):
        second = name.replace("lora_A", "lora_B")
        delta = 2 * (a[second] + b[second]) @ (a[name] + b[name])  # alpha / r is 2
        inside = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
        torch.testing.assert_close(linear[inside], dict(task.base.named_parameters())[inside] + delta)


def test_a_second_task_that_adds_nothing_leaves_the_first_as_it_was(args, task):
    one = trained(runs_of(args, task, lr=1e-2)[0], task).model
    untrained = fresh_model(task.second.base, METHODS["lora"], 0.0, 4, 0)  # B is zero
    batches = task.batches(task.texts.data.held_out)
    both = after.summed(task.base, merged(one), merged(untrained))
    assert score(both, batches)["loss"] == pytest.approx(score(merged(one), batches)["loss"], rel=1e-4)


def test_heads_are_swapped(args, task):
    model = fresh_model(task.base, METHODS["lora"], 0.0, 4, 0)
    batch = task.batches(task.texts.data.held_out)[0]
    batch = {name: value for name, value in batch.items() if name != "labels"}
    model.eval()
    first = model(**batch).logits
    head = swap_head(fresh_model(task.second.base, METHODS["lora"], 0.0, 4, 1), {})
    before = swap_head(model, head)
    assert model(**batch).logits.shape == (len(first), 3)
    assert any(p is q for p in model.parameters() for q in head["classifier"].parameters())
    assert swap_head(model, before) == head and torch.equal(model(**batch).logits, first)


def test_a_second_task_that_is_the_opposite_makes_the_first_forgotten(args, task, monkeypatch):
    """Planted forgetting is found, and without any training of the second nothing is forgotten."""
    changes = {"flip": 0.0, "examples": 64, "epochs": 6, "lr": 1e-2, "second_steps": 32}
    (run,) = (run for run in runs_of(args, task, **changes) if run.then == "sequence")
    data = task.texts.data
    turned = dict(zip(data.labels, data.labels[::-1], strict=True))
    other = dataclasses.replace(
        data,
        pool=[dataclasses.replace(example, label=turned[example.label]) for example in data.pool],
        held_out=[dataclasses.replace(example, label=turned[example.label]) for example in data.held_out],
    )
    opposite = dataclasses.replace(task, texts=dataclasses.replace(task.texts, data=other))
    done = trained(run, dataclasses.replace(task, second=opposite))
    found = after.sequence(done)
    assert found["steps"] == [0, 8, 16, 24, 32] and len(found["sequence"]) == 5
    assert found["sequence"][0]["first_accuracy"] == execute_all([run.training], task)[0]["curve"][-1]["accuracy"]
    assert found["second_accuracy"] > 0.9
    still = dataclasses.replace(done, run=dataclasses.replace(run, lr=0.0))
    assert after.sequence(still)["first_change"] == 0 and {p["first_accuracy"] for p in found["sequence"]} != {1.0}


# --- general text ---------------------------------------------------------------------------------------------------


def test_the_loss_on_general_text(files, decoder):
    args = compare.parse_arguments(generating(files, decoder, "--then", "general", "quantise", "scale"))
    task = load_task(args)
    plain, quantise, scale, general = execute_all(runs_of(args, task, lr=1e-2), task)
    assert general["task_loss"] == pytest.approx(plain["loss"], rel=1e-4) and quantise["int8_agreement"] > 0.5
    assert general["general_change"] == pytest.approx(general["general_loss"] - general["general_before"]) != 0
    assert scale["x1_forgotten"] == general["general_change"] != scale["x0.5_forgotten"]
    pieces = windows(task)
    losses = []
    for ids in pieces:
        with torch.no_grad():
            losses.append(task.base(input_ids=ids, labels=ids).loss.item())
    assert general["general_before"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert len(pieces) == 16 and {piece.shape for piece in pieces} == {(1, 128)}
    (still,) = execute_all([run for run in runs_of(args, task, lr=0.0) if run.then == "general"], task)
    assert still["general_change"] == pytest.approx(0, abs=1e-6)


# --- detectors ------------------------------------------------------------------------------------------------------


def test_auroc_is_that_of_the_rank_sum_test():
    from scipy import stats

    rng = np.random.default_rng(0)
    for shift in (0.0, 1.0):
        wrong = rng.random(200) < 0.3
        scores = np.round(rng.normal(0, 1, 200) + shift * wrong, 1)  # with ties
        u = stats.mannwhitneyu(scores[wrong], scores[~wrong]).statistic
        expected = u / (wrong.sum() * (~wrong).sum())
        assert auroc(torch.tensor(scores), torch.tensor(wrong)) == pytest.approx(expected)
        assert abs(expected - 0.5) < 0.1 if shift == 0 else expected > 0.7


def test_detectors_are_of_the_examples_that_were_trained_on(args, task):
    """Plain losses by hand, text by text; a model that learnt the right labels alone finds the wrong ones."""
    changes = {"flip": 0.25, "examples": 64, "epochs": 6, "lr": 1e-2}
    (run,) = (run for run in runs_of(args, task, **changes) if run.then == "detect")
    right = trained(dataclasses.replace(run.training, flip=0.0), task)
    done = dataclasses.replace(trained(run, task), model=right.model)
    found = after.detect(done)
    assert found["loss_auroc"] > 0.95
    losses = []
    for example in done.training.examples:
        (batch,) = task.batches([example])
        logits = right.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"]).item())
    assert found["loss_auroc"] == pytest.approx(
        auroc(torch.tensor(losses), torch.tensor(done.training.wrong)), abs=1e-3
    )
    assert found["noise_gain"] == pytest.approx(found["noise_auroc"] - found["loss_auroc"])


def test_the_ascent_step_is_that_of_sam(args, task):
    model = fresh_model(task.base, METHODS["lora"], 0.0, 4, 0).eval()
    batches = task.batches(task.texts.data.held_out, 16)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    whole = task.batches(task.texts.data.held_out, 1000)
    grads = torch.autograd.grad(after.mean_loss(model, whole[0]), [p for p in model.parameters() if p.requires_grad])
    after.ascend(model, batches)
    moved = [p.detach() - q for p, q in zip((p for p in model.parameters() if p.requires_grad), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(after.RADIUS, rel=1e-3)
    flat = [torch.cat([t.flatten() for t in each]) for each in (moved, grads)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0).item() > 0.999


def test_base_weights_are_never_written(args, task):
    before = {name: p.clone() for name, p in task.base.named_parameters()}
    execute_all(runs_of(args, task, "lora"), task)
    assert all(torch.equal(p, before[name]) for name, p in task.base.named_parameters())


def test_a_head_that_is_no_single_layer_is_swapped(files):
    """RoBERTa's head is a module of two layers."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    one, other = (
        fresh_model(RobertaForSequenceClassification(config), METHODS[kind], 0.0, 4, 0) for kind in ("lora", "gralora")
    )
    for model in (one, other):
        head = copy.deepcopy(swap_head(model, {}))
        for p in head["classifier"].parameters():
            torch.nn.init.zeros_(p)
        swap_head(model, head)
        model.eval()
        assert not model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.any()
