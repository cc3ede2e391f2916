"""Statistics, tables and pictures of results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flatlora import Landscape

Values = dict[int, dict[str, Any]]  # results by seed
Grid = dict[tuple[float, int], float]  # accuracy by learning rate and epochs


@dataclass(frozen=True)
class Difference:
    """Of paired values: how many, their mean difference, its standard error, and the p-value of a paired t-test."""

    n: int
    mean: float
    error: float
    p: float


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """`values` against `baseline`, pair by pair."""
    from scipy import stats

    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    n = len(differences)
    if n < 2:
        return Difference(n, differences[0] if n else math.nan, math.nan, math.nan)
    error = statistics.stdev(differences) / n**0.5
    if error == 0:  # scipy warns and returns nan
        return Difference(n, differences[0], 0.0, 1.0 if differences[0] == 0 else 0.0)
    return Difference(n, statistics.mean(differences), error, float(stats.ttest_rel(values, baseline).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): p-values that may be compared with a level after all of these have been looked at.

    NaN, a comparison that could not be made, stays and is not counted.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, highest = list(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


# --- tables ---------------------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    values = [scale * value for value in values]
    if not values:
        return ""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:{form}}"


def column(results: Values, name: str) -> list[float]:
    return [result[name] for result in results.values() if name in result]


COLUMNS = [  # heading, name of the measure, scale, form
    ("loss", "loss", 1, ".3f"),
    ("ECE, %", "ece", 100, ".1f"),
    ("wrong labels learnt, %", "memorised", 100, ".0f"),
    ("other domain, %", "other_accuracy", 100, ".1f"),
    ("rise under noise", "rise", 1, ".3f"),
]


def table(rows: dict[str, Values], baselines: dict[str, str], measure: str = "accuracy") -> str:
    """A Markdown table: rows by name, each compared with the row that `baselines` names for it, seed by seed.

    Values are mean ± standard error over the seeds; Holm's correction is over the comparisons of this table.
    """
    differences = {}
    for name, other in baselines.items():
        seeds = sorted(rows[name].keys() & rows[other].keys())
        pairs = [[100 * rows[which][seed][measure] for seed in seeds] for which in (name, other)]
        differences[name] = paired_difference(*pairs)
    corrected = dict(zip(differences, holm([difference.p for difference in differences.values()]), strict=True))
    columns = [each for each in COLUMNS if any(column(results, each[1]) for results in rows.values())]
    headings = ["", "n", f"{measure}, %", "best epoch*, %", "against", "difference", "p", "p (Holm)"]
    headings += [heading for heading, *_ in columns] + ["step, ms"]
    lines = [headings, ["---"] * len(headings)]
    for name, results in rows.items():
        cells = [name, str(len(results)), mean_and_error(column(results, measure), ".1f", 100)]
        best = [max(point["accuracy"] for point in result["curve"]) for result in results.values()]
        cells.append(mean_and_error(best, ".1f", 100))
        if name in differences and differences[name].n > 1:
            d = differences[name]
            cells += [baselines[name], f"{d.mean:+.1f} ± {d.error:.1f}", f"{d.p:.2g}", f"{corrected[name]:.2g}"]
        else:
            cells += [baselines.get(name, ""), "", "", ""]
        cells += [mean_and_error(column(results, measured), form, scale) for _, measured, scale, form in columns]
        cells.append(f"{1000 * statistics.median(column(results, 'step_seconds')):.0f}" if results else "")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@dataclass(frozen=True)
class Figure:
    """What a table compares: a name among the results, and how it is printed.

    `against_zero`: a difference of two figures of one model, tested for itself and not against a baseline.
    """

    heading: str
    name: str
    scale: float
    form: str
    against_zero: bool = False


CALIBRATION = [
    Figure("ECE, %", "ece", 100, ".1f"),
    Figure("ECE after temperature scaling, %", "scaled_ece", 100, ".1f"),
    Figure("Brier score", "brier", 1, ".3f"),
    Figure("accuracy of the 80 % most confident answers, %", "covered_accuracy", 100, ".1f"),
]


def figures_table(rows: dict[str, Values], baselines: dict[str, str], figures: Sequence[Figure]) -> str:
    """A Markdown table of figures, row by row; Holm's correction is over all its comparisons."""
    compared = [(figure, name) for figure in figures for name in rows if column(rows[name], figure.name)]
    differences = [compared_figure(figure, name, rows, baselines) for figure, name in compared]
    corrected = holm([difference.p for difference in differences])
    headings = ["", "", "n", "mean", "against", "difference", "p", "p (Holm)"]
    lines = [headings, ["---"] * len(headings)]
    for (figure, name), d, p in zip(compared, differences, corrected, strict=True):
        values = column(rows[name], figure.name)
        cells = [figure.heading, name, str(len(values)), mean_and_error(values, figure.form, figure.scale)]
        if d.n > 1:
            other = "zero" if figure.against_zero else baselines[name]
            cells += [other, f"{d.mean:+{figure.form}} ± {d.error:{figure.form}}", f"{d.p:.2g}", f"{p:.2g}"]
        else:
            cells += [""] * 4
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def compared_figure(figure: Figure, name: str, rows: dict[str, Values], baselines: dict[str, str]) -> Difference:
    """The figure of a row against that of its baseline, seed by seed, or against zero."""
    values = {seed: figure.scale * result[figure.name] for seed, result in rows[name].items() if figure.name in result}
    if figure.against_zero:
        return paired_difference(list(values.values()), [0.0] * len(values))
    baseline = rows.get(baselines.get(name, ""), {})
    seeds = [seed for seed in sorted(values) if figure.name in baseline.get(seed, {})]
    others = [figure.scale * baseline[seed][figure.name] for seed in seeds]
    return paired_difference([values[seed] for seed in seeds], others)


NOTE = (
    "Mean ± standard error over the seeds; differences are paired over seeds, p from a paired t-test, Holm over the "
    "table's comparisons. *The epoch that is best on the first test texts: an upper bound that nobody can choose "
    "without them. A step is timed by the processor time of one thread on a CPU, by the clock on a GPU."
)

# --- pictures -------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise SystemExit("error: pictures need matplotlib: pip install matplotlib") from reason
    return Figure(figsize=(width, height), layout="constrained")


def means_and_errors(values: Iterable[Sequence[float]]) -> tuple[list[float], list[float]]:
    """NaN for what was not measured; no standard error of a single seed."""
    found = list(values)
    means = [statistics.mean(each) if each else math.nan for each in found]
    return means, [statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0 for each in found]


def figure_columns(results: Values, figures: Sequence[Figure]) -> list[list[float]]:
    return [[figure.scale * value for value in column(results, figure.name)] for figure in figures]


def training_curves(rows: dict[str, Values], title: str, measure: str = "accuracy", points: str = "curve") -> Any:
    """A figure with one line per row: the mean over seeds after every epoch, and a band of one standard error.

    `points` may be "sequence": over the steps of a second task.
    """
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for name, results in rows.items():
        curves = [[100 * point[measure] for point in result[points]] for result in results.values()]
        if not curves:
            continue
        means, errors = means_and_errors(zip(*curves, strict=True))
        epochs = range(1, len(means) + 1) if points == "curve" else next(iter(results.values()))["steps"]
        (line,) = axes.plot(epochs, means, label=name)
        axes.fill_between(
            epochs,
            [m - e for m, e in zip(means, errors, strict=True)],
            [m + e for m, e in zip(means, errors, strict=True)],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    xlabel = "epoch" if points == "curve" else "step of the second task"
    axes.set(xlabel=xlabel, ylabel=f"{measure}, %".replace("_", " "), title=title)
    axes.legend(fontsize=8)
    return figure


def mean_landscapes(rows: dict[str, Values]) -> dict[str, Landscape]:
    """The losses around the models of each row, the mean over seeds; rows without any are left out."""
    found = {}
    for row, results in rows.items():
        seen = [result["landscape"] for result in results.values() if "landscape" in result]
        if seen:
            lines = {name: zip(*(each["lines"][name] for each in seen), strict=True) for name in seen[0]["lines"]}
            means = {name: [statistics.mean(losses) for losses in line] for name, line in lines.items()}
            found[row] = Landscape(seen[0]["at"], means)
    return found


def heat_maps(grids: dict[str, Grid], title: str) -> Any:
    """A figure with one map per method: test accuracy over learning rate and epochs, on one scale of colours.

    A map's title has the mean and the worst of its cells: how much there is to lose by not tuning.
    """
    figure = new_figure(1.2 + 3.2 * len(grids), 3.4)
    values = [100 * value for grid in grids.values() for value in grid.values()]
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for each, (name, grid) in zip(axes, grids.items(), strict=True):
        rates, epochs = (sorted(set(numbers)) for numbers in zip(*grid, strict=True))
        rows = [[100 * grid.get((lr, epoch), math.nan) for epoch in epochs] for lr in rates]
        image = each.imshow(rows, vmin=min(values), vmax=max(values), aspect="auto", origin="lower")
        each.set_yticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        each.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
        mean, worst = 100 * statistics.mean(grid.values()), 100 * min(grid.values())
        each.set(xlabel="epochs", ylabel="learning rate", title=f"{name}\nmean {mean:.1f}, worst {worst:.1f}")
    figure.colorbar(image, ax=list(axes), label="test accuracy, %")
    figure.suptitle(title)
    return figure


def marks(rows: dict[str, Values], figures: Sequence[Figure], title: str) -> Any:
    """A figure with a mark for each row at each of `figures`, of one unit: means, and bars of one standard error."""
    figure = new_figure(7, 0.8 + 0.4 * len(figures) + 0.2 * len(rows))
    axes = figure.add_subplot()
    for i, (name, results) in enumerate(rows.items()):
        means, errors = means_and_errors(figure_columns(results, figures))
        places = [place + 0.5 * (i + 0.5) / len(rows) - 0.25 for place in range(len(figures))]
        axes.errorbar(means, places, xerr=errors, fmt="o", markersize=4, capsize=2, label=name)
    axes.set_yticks(range(len(figures)), [figure.heading for figure in figures])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center")
    return figure


def trade_off(rows: dict[str, Values], across: Sequence[Figure], up: Sequence[Figure], title: str) -> Any:
    """A figure with a line for each row through pairs of figures like "x1: loss", with bars of one standard error."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for name, results in rows.items():
        (x, x_error), (y, y_error) = (means_and_errors(figure_columns(results, each)) for each in (across, up))
        axes.errorbar(x, y, yerr=y_error, xerr=x_error, marker="o", markersize=4, capsize=2, label=name)
        for each, *place in zip(up, x, y, strict=True):
            axes.annotate(each.heading.partition(": ")[0], place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(**{side: of[0].heading.partition(": ")[2] for side, of in (("xlabel", across), ("ylabel", up))})
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    return figure


def curves_over(series: dict[str, dict[float, list[float]]], xlabel: str, ylabel: str, title: str) -> Any:
    """A figure with one line per series over a logarithmic axis: means, and a bar of one standard error."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for name, points in series.items():
        axes.errorbar(list(points), *means_and_errors(points.values()), label=name, marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(fontsize=8)
    return figure
