"""The README's two pictures: the idea, and what LoRASAM gained, from figures that stand in examples/results.md.

python examples/research/pictures.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

EXAMPLES = Path(__file__).parent.parent
GAINS = (  # setting, difference of test accuracy in points and its standard error, as in results.md
    ("40 % wrong labels, headlines: ρ 0.05, same rate", "+1.3 ± 0.3"),
    ("eight other seeds", "+1.7 ± 0.3"),
    ("20 % wrong labels, movies: ρ 0.05, same rate", "+1.1 ± 0.3"),
    ("eight other seeds", "−0.3 ± 0.1"),
    ("40 % wrong, headlines: ρ 0.15, against LoRA's better rate", "+2.1 ± 0.7"),
    ("20 % wrong, movies: ρ 0.05, against LoRA's better rate", "−0.9 ± 0.3"),
    ("20 % wrong, movies: ρ 0.05, both at the better rate", "−0.1 ± 0.3"),
    ("20 % wrong, movies: ρ 0.15, same rate", "−2.6 ± 1.5"),
    ("clean labels, 200 headlines: ρ 0.05, same rate", "+0.5 ± 0.1"),
    ("clean labels, 1,000 headlines: ρ 0.05, same rate", "−0.2 ± 0.1"),
    ("40 % wrong, headlines: two-pass SAM, best ρ, against the better rate", "+0.6 ± 1.2"),
)


def number(text: str) -> float:
    return float(text.strip().replace("−", "-"))


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, 0.9, boxstyle="round,pad=0.05", facecolor=colour, edgecolor="0.3"))
    axes.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=10)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "0.3") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.5})


def idea() -> Figure:
    """One adapted layer: what it computes with in training, and where ε comes from."""
    figure = Figure((9, 2.9))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 18), ylim=(0, 5.8))
    axes.axis("off")
    box(axes, 2.6, 4.2, 4.6, "W0, frozen (float, NF4, int8)", "#dddddd")
    box(axes, 2.6, 2.6, 4.6, "s·B·A, the LoRA adapter", "#cfe3f7")
    box(axes, 2.6, 1.0, 4.6, "ε, in training alone", "#f9d9c0")
    axes.text(0.9, 3.05, "x", fontsize=14, ha="center", va="center")
    axes.text(9.0, 3.05, "+", fontsize=18, ha="center", va="center")
    axes.text(10.9, 3.05, "y = x·(W' + ε)ᵀ", fontsize=12, ha="left", va="center")
    axes.text(10.9, 4.65, "W' = W0 + s·B·A: evaluated, saved, merged", fontsize=10, ha="left", va="center")
    for y in (4.65, 3.05, 1.45):
        arrow(axes, (1.2, 3.05), (2.5, y))
        arrow(axes, (7.3, y), (8.6, 3.05))
    arrow(axes, (9.4, 3.05), (10.8, 3.05))
    axes.text(10.9, 1.45, "optimizer.step() makes the next ε\nfrom the gradients of A and B", fontsize=10, va="center")
    arrow(axes, (10.7, 1.25), (7.3, 1.25), "#c8551b")
    return figure


def result() -> Figure:
    figure = Figure((9, 3.4), layout="constrained")
    axes = figure.subplots()
    for row, (name, gain) in enumerate(GAINS):
        mean, error = map(number, gain.split("±"))
        colour = "0.5" if "two-pass" in name else "#1f5fa8"
        axes.errorbar(mean, row, xerr=error, fmt="o", capsize=3, color=colour)
    axes.axvline(0, color="0.3", lw=1)
    axes.set_yticks(range(len(GAINS)), [name for name, _ in GAINS], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy against LoRA, points (± standard error)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def main() -> None:
    for name, figure in (("idea", idea()), ("result", result())):
        figure.savefig(EXAMPLES / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
