"""Kept, dropped and merged patches painted on a picture."""

from __future__ import annotations

from colorsys import hsv_to_rgb

import numpy as np
from numpy.typing import NDArray

from .panes import ABSENT, Pane
from .tower_pictures import Picture

DIMMED = 0.2
"""What is left of a dropped patch on white."""
TINT = 0.4
"""Share of its group's colour in a merged patch."""
GOLDEN_RATIO = 0.618033988749895


def paint_kept(pane: Pane, kept: NDArray[np.bool_], groups: NDArray[np.int64] | None = None) -> Picture:
    """Return the picture with kept patches as they are, dropped ones faded to white, merged ones in their group's colour.

    Args:
        pane: the picture and its cells.
        kept: bool `[tokens]`, whether the value of each visual token lives on, in its own token or merged into another.
        groups: int64 `[tokens]`, the token that each went into; those alone in theirs keep their own colours.
    """
    painted = pane.picture.astype(np.float32)
    sizes = np.bincount(groups[groups >= 0]) if groups is not None else np.zeros(0, dtype=np.int64)
    for row, column in np.ndindex(pane.tokens.shape):
        token = pane.tokens[row, column]
        if token == ABSENT:
            continue
        cell = pane.cell(row, column)
        if not kept[token]:
            painted[cell] = DIMMED * painted[cell] + (1 - DIMMED) * 255
        elif groups is not None and sizes[groups[token]] > 1:
            painted[cell] = (1 - TINT) * painted[cell] + TINT * group_colour(int(groups[token]))
    return painted.round().astype(np.uint8)


def group_colour(group: int) -> NDArray[np.float32]:
    """Return the colour of a group, `[3]` in 0..255; neighbouring numbers get hues far apart."""
    return np.float32(255) * np.array(hsv_to_rgb(group * GOLDEN_RATIO % 1, 0.85, 0.95), dtype=np.float32)


def score_map(pane: Pane, scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the score of each cell, `[rows, columns]`; NaN where there is no token or it has none."""
    values = scores[np.maximum(pane.tokens, 0)].astype(np.float32)
    values[pane.tokens == ABSENT] = np.nan
    return values
