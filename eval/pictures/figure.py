"""Panels laid out in a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .panels import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_WIDTH = 3.2
"""Inches."""
WIDE = 2.5
"""Pictures wider than this times their height stand under each other."""
BAR_HEIGHT = 0.15
SHOWN_SCORES = (0.01, 0.99)
"""Quantiles at the ends of the colour scale."""
KEPT_COLOURS = ("0.85", "#0072b2")


def figure_of(rows: Sequence[Sequence[Panel]]) -> Figure:
    """Return a figure of the panels: a row an image, a column a method; wide pictures a line each.

    Args:
        rows: for each image its panels.
    """
    from .shown_figure import ShownFigure

    shapes = [_height_over_width(panel) for row in rows for panel in row]
    if rows and max(len(row) for row in rows) > 1 and max(shapes) < 1 / WIDE:
        rows = [[panel] for row in rows for panel in row]
    columns = max(len(row) for row in rows)
    width = PANEL_WIDTH * (1 if columns > 1 else 3)
    heights = [max(_height_over_width(panel) for panel in row) * width + _lines(row) * 0.17 + 0.35 for row in rows]
    figure = ShownFigure(figsize=(width * columns, sum(heights)), dpi=150, layout="constrained")
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            if panel.panes:
                _draw_scores(figure, grid[number, column], panel)
            else:
                _draw(figure.add_subplot(grid[number, column]), panel)
    return figure


def _lines(row: Sequence[Panel]) -> int:
    return 1 + max(panel.caption.count("\n") for panel in row)


def _height_over_width(panel: Panel) -> float:
    if panel.panes:
        height = max(pane.picture.shape[0] for pane, _ in panel.panes)
        return height / sum(pane.picture.shape[1] * height / pane.picture.shape[0] for pane, _ in panel.panes)
    return BAR_HEIGHT if panel.picture is None else panel.picture.shape[0] / panel.picture.shape[1]


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.colors import ListedColormap

    if panel.picture is None:
        # No geometry: which indices are alive is all that can be shown.
        axes.imshow(panel.kept[None].astype(np.uint8), aspect="auto", cmap=ListedColormap(KEPT_COLOURS), vmin=0, vmax=1)
        axes.set_xlabel(f"index of the visual token (no geometry is known)\n{panel.caption}", fontsize=8)
        axes.set_yticks([])
    else:
        axes.imshow(panel.picture, interpolation="nearest")
        axes.set_xlabel(panel.caption, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_title(panel.title, fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_scores(figure: Figure, place: Any, panel: Panel) -> None:
    widths = [pane.picture.shape[1] / pane.picture.shape[0] for pane, _ in panel.panes]
    inner = place.subgridspec(1, len(panel.panes), width_ratios=widths)
    finite = np.concatenate([values[np.isfinite(values)] for _, values in panel.panes])
    # A few tokens that take nearly all attention would leave the others one colour.
    low, high = np.quantile(finite, SHOWN_SCORES) if finite.size else (0.0, 1.0)
    for number, (pane, values) in enumerate(panel.panes):
        axes = figure.add_subplot(inner[number])
        height, width = pane.picture.shape[:2]
        axes.imshow(pane.picture.mean(-1), cmap="gray", vmin=0, vmax=255, alpha=0.35)
        axes.imshow(
            values, cmap="viridis", alpha=0.75, vmin=low, vmax=high, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
        )
        axes.set_axis_off()
        if number == 0:
            axes.set_title(panel.title, fontsize=9)
