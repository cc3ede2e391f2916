"""The loss along directions in the full weights, and pictures of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from .. import checks
from ..layers.view import lora_layers
from .measuring import LossFn, RandomDirection, WorstDirection, attached, measuring

_LABEL = "{} direction, ‖ε‖ / ‖W'‖"


@dataclass(frozen=True)
class Landscape:
    """Mean losses around a model.

    Attributes:
        at: how far the weights are moved, relative to their norm: ``±‖ε‖_F / ‖W'‖_F`` over all adapted layers.
        lines: the losses along each direction, one for each of `at`.
        plane: ``plane[i][j]`` is the loss at ``at[i]`` along the first direction and ``at[j]`` along the second, or
            None.
    """

    at: list[float]
    lines: dict[str, list[float]]
    plane: list[list[float]] | None = None


@torch.no_grad()
def landscape(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    directions: Sequence[str] = ("random", "worst"),
    plane: bool = False,
    reach: float = 0.2,
    points: int = 11,
    seed: int = 0,
    adapter: str | Iterable[str] | None = None,
    progress: bool = False,
) -> Landscape:
    """The mean loss over `batches` along directions in the adapted layers' full weights, on both sides of the model.

    At a distance t, ``"random"`` adds the noise of `weight_noise`, of expected length ``t·‖W'‖_F``, and ``"worst"``
    adds ``t·‖W'‖_F · G/‖G‖_F``, with G as in `worst_case_rise`, whose memory it needs. Both are of one length, so the
    lines may be compared, also between models.

    The model is measured in eval mode and left as it was found; no weight is written to.

    Args:
        model, loss_fn, batches, adapter, progress: as in `noise_rise`.
        directions: one or two of ``"random"`` and ``"worst"``.
        plane: whether to measure all sums of two directions, in ``points²`` passes over `batches`; the lines are then
            its middle row and column.
        reach: the largest distance, relative to ``‖W'‖_F``.
        points: odd number of distances, from ``-reach`` to ``reach``.
        seed: of the random direction's private generator; equal seeds give models of the same shape the same one.

    Raises:
        ValueError: an unknown direction, one twice, a plane of one, an even number of points, no batches, no adapted
            layer.
    """
    reach = checks.number("reach", reach, above=0.0)
    directions, at = _directions(directions, plane), _distances(reach, points)
    layers = lora_layers(model, adapter)
    random, worst = RandomDirection(layers, seed), None
    passes = (points**2 if plane else points * len(directions)) + ("worst" in directions)
    with measuring(model, loss_fn, batches, "landscape", passes, progress) as losses, ExitStack() as stack:
        norm = random.weight_norm()
        if "worst" in directions:
            worst = WorstDirection(layers)
            stack.enter_context(attached(model, worst))
            worst.find(losses)
        if "random" in directions:
            stack.enter_context(attached(model, random))

        def loss_at(**moved: float) -> float:
            random.at = moved.get("random", 0.0)
            if worst is not None:
                worst.at = moved.get("worst", 0.0) * norm
            return losses.mean()

        if not plane:
            return Landscape(at, {name: [loss_at(**{name: t}) for t in at] for name in directions})
        first, second = directions
        grid = [[loss_at(**{first: t, second: u}) for u in at] for t in at]
        return Landscape(at, {first: [row[points // 2] for row in grid], second: grid[points // 2]}, grid)


def _directions(directions: Sequence[str], plane: bool) -> list[str]:
    found = [checks.option("direction", name, ("random", "worst")) for name in directions]
    if len(set(found)) != len(found) or not found:
        raise ValueError(f"directions must name one or two different ones, got {found}")
    if plane and len(found) != 2:
        raise ValueError(f"a plane is spanned by two directions, got {found}")
    return found


def _distances(reach: float, points: int) -> list[float]:
    if checks.integer("points", points, 3) % 2 == 0:
        raise ValueError(f"points must be odd, so that the model itself is the one in the middle; got {points}")
    return [reach * (2 * i / (points - 1) - 1) for i in range(points)]


def plot_landscape(results: Mapping[str, Landscape], path: str | PathLike[str]) -> Any:
    """Draws landscapes and saves the picture.

    One landscape with a plane is drawn as contours, with the model at a cross in the middle. Otherwise each direction
    gets a panel, with one line for each model.

    Args:
        results: landscapes by the model's name in the picture.
        path: of the picture; its suffix says the format.

    Returns:
        The `matplotlib.figure.Figure` that was saved.

    Raises:
        TypeError: `results` is no dict.
        ValueError: no landscapes, landscapes along different directions, or a plane without a finite loss.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError("pictures need matplotlib; install it with: pip install 'flatlora[plot]'") from reason
    if not isinstance(results, Mapping):
        raise TypeError(f"results must be landscapes by name, {{'LoRA': landscape(...)}}; got {type(results).__name__}")
    kinds = {tuple(found.lines) for found in results.values()}
    if len(kinds) != 1:
        raise ValueError(f"need landscapes along the same directions, got {sorted(kinds) or 'no landscape'}")
    (names,) = kinds
    only = next(iter(results.values()))
    if len(results) == 1 and only.plane is not None:
        figure = Figure(figsize=(5.5, 4.5), layout="constrained")
        _draw_plane(figure, next(iter(results)), only, names)
    else:
        figure = Figure(figsize=(0.8 + 4.2 * len(names), 3.8), layout="constrained")
        _draw_lines(figure, results, names)
    figure.savefig(path, dpi=130)
    return figure


def _draw_lines(figure: Any, results: Mapping[str, Landscape], names: Sequence[str]) -> None:
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for model, found in results.items():
            axes.plot(found.at, found.lines[name], label=model)
        axes.set(xlabel=_LABEL.format(name), ylabel="loss")
        axes.legend(fontsize=8)


def _draw_plane(figure: Any, model: str, found: Landscape, names: Sequence[str]) -> None:
    axes = figure.add_subplot()
    assert found.plane is not None
    columns = [list(column) for column in zip(*found.plane, strict=True)]  # the first direction is drawn to the right
    finite = [loss for row in found.plane for loss in row if math.isfinite(loss)]
    if not finite:
        raise ValueError(f"the landscape {model!r} has no finite loss, not even the model's own; look for NaN in it")
    low, high = min(finite), max(finite)
    levels = [low + (high - low) * (i / 12) ** 2 for i in range(13)] if high > low else None
    contours = axes.contour(found.at, found.at, columns, levels)
    axes.clabel(contours, fontsize=7)
    axes.plot([0], [0], marker="+", color="black")
    axes.set(xlabel=_LABEL.format(names[0]), ylabel=_LABEL.format(names[1]), title=model)
