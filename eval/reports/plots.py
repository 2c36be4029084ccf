"""Pareto plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vlmprune.eval.run.cells import FULL

from .summary import Row


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point costs at most as much and scores at least as well, with one of the two strict."""
    return [not any(cost <= x and score >= y and (cost, score) != (x, y) for cost, score in points) for x, y in points]


def plot_pareto(rows: Sequence[Row], path: Path, cost: Callable[[Row], float | None], label: str, title: str) -> bool:
    """Draw average accuracy against `cost` of every row, one line a method, points on the Pareto front ringed.

    Returns False, and draws nothing, where the cost of some row is unknown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = [cost(row) for row in rows]
    known = [value for value in costs if value is not None]
    if len(known) < len(rows):
        return False
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(value, 100 * row.average) for value, row in zip(known, rows, strict=True)]
    titles = list(dict.fromkeys(row.title for row in rows))
    for i, name in enumerate(titles):
        mine = sorted(point for point, row in zip(points, rows, strict=True) if row.title == name)
        x, y = zip(*mine, strict=True)
        if name == FULL:
            axes.axhline(y[0], color="0.6", linewidth=0.8, linestyle="--", zorder=1)
            axes.plot(x, y, "*", color="black", markersize=12, label="full model", zorder=4)
        else:
            axes.plot(
                x, y, marker="osD^vP<>Xp"[i % 10], color=f"C{i % 10}", linewidth=1.3, markersize=5, label=name, zorder=3
            )
    front = [point for point, best in zip(points, pareto_front(points), strict=True) if best]
    front_x, front_y = zip(*front, strict=True)
    axes.scatter(
        front_x,
        front_y,
        s=120,
        facecolors="none",
        edgecolors="black",
        linewidths=0.9,
        zorder=5,
        label="Pareto front",
    )
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, mean of tasks (%)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path)
    return True
