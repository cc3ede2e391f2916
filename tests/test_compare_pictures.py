"""The pictures of examples/research/compare.py, read back from the figures, and the table and picture over ranks."""

# ruff: noqa: F811, I001  (fixtures are imported, and `test_compare` makes the examples importable)

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from test_compare import a_run, arguments, compare, execute, files, planted, task  # noqa: F401

import double_descent
from comparing.report import Figure, curves_over, heat_maps, marks, trade_off, training_curves
from comparing.after import AFTER
from comparing.store import Store

pytest.importorskip("matplotlib")


def test_training_curves_are_in_the_figure():
    rows = {"one": {0: planted(0.4), 1: planted(0.8)}, "other": {0: planted(0.5)}}
    (axes,) = training_curves(rows, "a title").axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"one", "other"} == {text.get_text() for text in axes.get_legend().get_texts()}
    assert lines["one"].get_xdata().tolist() == [1, 2] and axes.get_title() == "a title"
    assert lines["one"].get_ydata().tolist() == pytest.approx([30, 60])
    assert lines["other"].get_ydata().tolist() == pytest.approx([25, 50])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((20, 80))


def test_heat_maps_are_in_the_figure():
    one = {(1e-3, 4): 0.2, (1e-3, 8): 0.4, (1e-4, 4): 0.35, (1e-4, 8): 0.7}
    figure = heat_maps({"one": one, "other": {(1e-4, 8): 0.1, (1e-3, 4): 0.2}}, "a title")
    maps = [axes.get_images()[0] for axes in figure.axes[:2]]
    np.testing.assert_allclose(maps[0].get_array(), [[35, 70], [20, 40]])
    assert maps[1].get_array().mask.tolist() == [[True, False], [False, True]]
    assert maps[0].get_clim() == maps[1].get_clim() == (10, 70)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0.0001", "0.001"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["4", "8"]
    assert "mean 41.2, worst 20.0" in figure.axes[0].get_title()


def test_cells_of_the_heat_maps(files, task):
    results = {0: planted(0.4), 1: planted(0.8)}
    assert compare.cells_of(results, a_run(files, task, schedule="constant")) == pytest.approx({1: 0.3, 2: 0.6})
    assert compare.cells_of(results, a_run(files, task, schedule="linear")) == pytest.approx({2: 0.6})


def test_marks_and_trade_offs_are_in_the_figure():
    rows = {"one": {0: {"a": 0.1, "b": 1.0}, 1: {"a": 0.3, "b": 3.0}}, "other": {0: {"a": 0.5}}}
    a, b = Figure("all: share", "a", 100, ".1f"), Figure("all: loss", "b", 1, ".1f")
    (axes,) = marks(rows, [a, b], "a title").axes
    one, other = axes.containers
    assert one.lines[0].get_xdata().tolist() == pytest.approx([20, 2])
    (bar,) = one.lines[2]
    assert bar.get_segments()[0][:, 0].tolist() == pytest.approx([10, 30])
    assert other.lines[0].get_xdata()[0] == 50 and np.isnan(other.lines[0].get_xdata()[1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all: share", "all: loss"]
    (axes,) = trade_off({"one": rows["one"]}, [a, a], [b, b], "a title").axes
    line = axes.containers[0].lines[0]
    assert line.get_xdata().tolist() == pytest.approx([20, 20]) and line.get_ydata().tolist() == [2, 2]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share", "loss")


def test_every_measure_after_training_is_drawn(files, task):
    for name, after in AFTER.items():
        names = [figure.name for figure in after.figures]
        point = {**dict.fromkeys(names, 0.5), "steps": [0], "sequence": [{"first_accuracy": 0.5}]}
        rows = {"LoRA": {0: point, 1: point}}
        run = a_run(files, task, then=name, task="generate")
        assert names
        for _, figure in compare.drawn_after(run, rows, name):
            (axes,) = figure.axes
            assert axes.get_title().startswith(name) and (axes.containers or axes.lines)


def test_curves_over_ranks_are_in_the_figure():
    (axes,) = curves_over({"LoRA": {1: [0.2, 0.4], 8: [0.5]}}, "rank", "loss", "a title").axes
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [1, 8] and line.get_ydata().tolist() == pytest.approx([0.3, 0.5])


def test_the_table_over_ranks(files, tmp_path, monkeypatch, capsys):
    wanted = arguments(
        files, "--runs", "lora", "--seeds", "0-1", "--ranks", 1, 2, "--results", tmp_path / "results.jsonl"
    )
    monkeypatch.setattr(sys, "argv", ["double_descent.py", *wanted])
    double_descent.main()
    with Store(tmp_path / "results.jsonl") as store:
        by_rank = {rank: [] for rank in (1, 2)}
        for key, result in store.results.items():
            by_rank[json.loads(key)["r"]].append(result["loss"])
    means = [f"{np.mean(losses):.3f} ±" for losses in by_rank.values()]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| LoRA, lr 0.003: loss"))
    assert [cell.strip()[:7] for cell in row.split("|")[2:4]] == means
    assert double_descent.bumps([1, 3, 2, 2, 5, 4, 6]) == [1, 4] and double_descent.bumps([3, 2, 1]) == []


def test_landscapes_are_means_over_seeds_and_are_drawn(files, task, tmp_path, monkeypatch):
    result = execute(a_run(files, task, landscape=True), task)
    around = result["landscape"]
    assert set(around["lines"]) == {"random", "worst"} and len(around["at"]) == len(around["lines"]["worst"]) == 9
    assert around["lines"]["random"][4] == around["lines"]["worst"][4] < around["lines"]["worst"][-1]

    args = compare.parse_arguments(arguments(files, "--landscape", "--seeds", "0-1", "--pictures", tmp_path))
    regime, setting = compare.regimes(args, task.texts.name)[0], compare.Setting("lora", 0.0, 3e-3)
    drawn, plot = [], compare.plot_landscape
    monkeypatch.setattr(compare, "plot_landscape", lambda *given: drawn.append(plot(*given)))
    with Store(tmp_path / "results.jsonl") as store:
        for seed in (0, 1):
            lines = {"random": [1.0 + seed, 0.5, 1.0], "worst": [0.4, 0.5, 3.0 + seed]}
            store.add(compare.of(regime, setting, seed), planted(0.5, landscape={"at": [-1, 0, 1], "lines": lines}))
        compare.report(regime, [setting], store, args)
    (figure,) = drawn
    lines = [axes.get_lines()[0] for axes in figure.axes]
    assert [line.get_label() for line in lines] == ["LoRA, lr 0.003"] * 2
    assert lines[0].get_ydata().tolist() == [1.5, 0.5, 1.0] and lines[1].get_ydata().tolist() == [0.4, 0.5, 3.5]
    assert any(path.name.endswith("landscapes.png") for path in tmp_path.iterdir())


def test_pictures_are_saved(files, task, tmp_path):
    args = compare.parse_arguments(arguments(files, "--pictures", tmp_path / "pictures"))
    regime = compare.regimes(args, task.texts.name)[0]
    settings = [compare.Setting("lora", 0.0, lr) for lr in (1e-3, 3e-3)]
    with Store(tmp_path / "results.jsonl") as store:
        for setting in settings:
            store.add(compare.of(regime, setting, 0), planted(0.5))
        compare.report(regime, settings, store, args)
        compare.draw_grids({regime: settings}, store, args)
    names = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "pictures").iterdir())
    assert names == ["curves.png", "maps.png"]
