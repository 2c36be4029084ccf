"""Accuracy against cost: one colour and marker a method in every plot, names beside the data, budgets at the points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.eval.models.lower_resolution import LOWER_RESOLUTION
from vlmprune.eval.run.cells import FULL
from vlmprune.eval.run.result_folder import ResultFolderError
from vlmprune.methods.registry import method_names

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that paper swallows."""
MARKERS = "osD^vP<>Xp"


@dataclass(frozen=True)
class Point:
    """One row of a table in a plot. `margin` is half of the 95 % interval of its score against the unpruned model's."""

    title: str
    keep: str
    cost: float
    score: float
    margin: float = 0.0


def pareto_front(points: Sequence[tuple[float, float]], tolerance: float = 0.0) -> list[bool]:
    """Whether no cheaper point scores as well, differences up to `tolerance` ignored, and none that costs the same better."""
    return [
        not any((cost < x and score >= y - tolerance) or (cost == x and score > y) for cost, score in points)
        for x, y in points
    ]


def method_style(title: str) -> tuple[str, str]:
    """Colour and marker of a method, the same in every plot; methods share one of the two, never both."""
    names = [*method_names(), LOWER_RESOLUTION]
    name = title.split(":")[0]
    place = names.index(name) if name in names else len(names) + sum(map(ord, name))
    return COLOURS[place % len(COLOURS)], MARKERS[place // len(COLOURS) % len(MARKERS)]


def plot_pareto(points: Sequence[Point], path: Path, label: str, title: str) -> None:
    """Draw accuracy against cost, one line a method; the format is that of the file's ending (png, svg, pdf).

    Bars are 95 % intervals against the unpruned model on the same items. Rings mark what nothing cheaper matches; differences
    within one standard error do not count there.

    Raises:
        ResultFolderError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    titles = list(dict.fromkeys(point.title for point in points))
    last: dict[str, tuple[float, float]] = {}
    for name in titles:
        mine = sorted((point for point in points if point.title == name), key=lambda point: point.cost)
        x, y = [point.cost for point in mine], [100 * point.score for point in mine]
        last[name] = (x[-1], y[-1])
        if name == FULL:
            axes.axhline(y[0], color="0.6", linewidth=0.8, linestyle="--", zorder=1)
            axes.plot(x, y, "*", color="black", markersize=12, zorder=4)
            continue
        colour, marker = method_style(name)
        margins = [100 * point.margin for point in mine]
        axes.errorbar(
            x, y, yerr=margins if any(margins) else None, color=colour, marker=marker, linewidth=1.2, markersize=4.5,
            elinewidth=0.5, capsize=1.5, alpha=0.9, zorder=3,
        )  # fmt: skip
        for point in mine:
            axes.annotate(
                point.keep, (point.cost, 100 * point.score), xytext=(3, -8), textcoords="offset points",
                fontsize=5.5, color=colour,
            )  # fmt: skip
    margins = sorted(point.margin for point in points if point.margin)
    error = 100 * margins[len(margins) // 2] / 1.96 if margins else 0.0
    values = [(point.cost, 100 * point.score) for point in points]
    front = [value for value, best in zip(values, pareto_front(values, error), strict=True) if best]
    front_x, front_y = zip(*front, strict=True)
    axes.scatter(front_x, front_y, s=110, facecolors="none", edgecolors="black", linewidths=0.8, zorder=5)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, mean of tasks (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.set_xlim(left=0)
    _names_beside(axes, last)
    try:
        figure.savefig(path)
    except OSError as error_of_file:
        raise ResultFolderError(f"{str(path)!r} cannot be written: {error_of_file.strerror}.") from error_of_file


def _names_beside(axes: Any, last: dict[str, tuple[float, float]]) -> None:
    """Write every name right of the data, at the height of its line's last point as far as there is room, joined to it."""
    ordered = sorted(last, key=lambda name: -last[name][1])
    step = 1 / max(len(ordered), 18)
    low, high = axes.get_ylim()
    height = 1.0
    for place, name in enumerate(ordered):
        x, y = last[name]
        wanted = (y - low) / (high - low)
        height = max(min(wanted, height), (len(ordered) - place - 1) * step)
        colour = "black" if name == FULL else method_style(name)[0]
        axes.annotate(
            "full model" if name == FULL else name, (x, y), xytext=(1.03, height), textcoords="axes fraction",
            fontsize=7, color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": colour, "alpha": 0.5},
        )  # fmt: skip
        height -= step
