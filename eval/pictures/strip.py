"""Several pictures in one: side by side, in lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .tower_pictures import Picture

GAP = 6
WHITE = 255


def strip(pictures: Sequence[Picture], columns: int) -> Picture:
    """Return the pictures in lines of up to `columns`, brought to the height of the first, on white.

    Args:
        pictures: uint8 `[height, width, 3]` each.
        columns: pictures in a line.
    """
    from PIL import Image

    height = pictures[0].shape[0]
    scaled = [
        picture
        if picture.shape[0] == height
        else np.asarray(
            Image.fromarray(picture).resize((max(1, round(picture.shape[1] * height / picture.shape[0])), height))
        )
        for picture in pictures
    ]
    lines = [_line(scaled[first : first + columns]) for first in range(0, len(scaled), columns)]
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, GAP), (0, width - line.shape[1]), (0, 0)), constant_values=WHITE) for line in lines]
    return np.concatenate(padded)[:-GAP]


def _line(pictures: Sequence[Picture]) -> Picture:
    gap = np.full((pictures[0].shape[0], GAP, 3), WHITE, dtype=np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)
