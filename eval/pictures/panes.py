"""Where on the pictures that the tower saw the visual tokens of an image lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.patches.families.anyres import AnyresLayout

from .tower_pictures import Picture, PictureError

ABSENT = -1


@dataclass(frozen=True, eq=False)
class Pane:
    """A picture with a grid of cells over it.

    Attributes:
        title: "thumbnail", "crops" or "frame 3"; empty for a whole image.
        picture: uint8 `[height, width, 3]`.
        tokens: int64 `[rows, columns]`, the visual token of each cell; -1 where there is none.
    """

    title: str
    picture: Picture
    tokens: NDArray[np.int64]

    def cell(self, row: int, column: int) -> tuple[slice, slice]:
        """Return the pixels of a cell: rows and columns of the picture."""
        height, width = self.picture.shape[:2]
        rows, columns = self.tokens.shape
        return (
            slice(row * height // rows, (row + 1) * height // rows),
            slice(column * width // columns, (column + 1) * width // columns),
        )


def panes_of(layout: VisualLayout, pictures: Sequence[Picture], patch_size: int = 1) -> list[Pane]:
    """Return the panes of an image or video: its thumbnail and its stitched crops, or itself, or its frames.

    Args:
        layout: geometry of its visual tokens; nothing is returned where there is none.
        pictures: what the tower saw of it, tile after tile, frame after frame.
        patch_size: side of a patch in pixels; what is left over at the right and at the bottom, the tower does not read.

    Raises:
        PictureError: pictures and layout do not belong together.
    """
    if layout.tile_grid is None and layout.grid is None:
        return []
    pictures = [_whole_patches(picture, patch_size) for picture in pictures]
    if layout.crops is not None:
        return [_tile_pane("thumbnail", layout, pictures[0], layout.tile == 0), _stitched_pane(layout, pictures[1:])]
    frames = layout.frame.unique().tolist()
    if len(frames) == 1:
        # What follows the first tile was cut off a picture that this call showed whole.
        return [_tile_pane("", layout, pictures[0], layout.frame == frames[0])]
    if len(frames) > len(pictures):
        raise PictureError(f"{len(pictures)} frames given, but the record tells of {len(frames)}.")
    return [_tile_pane(f"frame {frame + 1}", layout, pictures[frame], layout.frame == frame) for frame in frames]


def _whole_patches(picture: Picture, patch_size: int) -> Picture:
    height, width = (size // patch_size * patch_size for size in picture.shape[:2])
    return picture[:height, :width]


def _tile_pane(title: str, layout: VisualLayout, picture: Picture, chosen: Tensor) -> Pane:
    mine = (chosen & ~layout.newline & (layout.row >= 0)).nonzero().flatten()
    return Pane(title, picture, _grid(layout.row[mine], layout.column[mine], mine))


def _stitched_pane(layout: VisualLayout, crops: Sequence[Picture]) -> Pane:
    assert layout.crops is not None
    rows, columns = layout.crops
    if len(crops) < rows * columns:
        raise PictureError(f"{len(crops)} crops given, but the record tells of {rows} x {columns}.")
    canvas = np.concatenate([np.concatenate(crops[row * columns : (row + 1) * columns], axis=1) for row in range(rows)])
    if isinstance(layout, AnyresLayout):
        # Without the padding, which no token shows.
        side = crops[0].shape[0] / layout.image.side
        top, left, height, width = (round(side * edge) for edge in layout.image.window)
        canvas = canvas[top : top + height, left : left + width]
    mine = ((layout.tile > 0) & ~layout.newline).nonzero().flatten()
    row, column = layout.stitched_row[mine], layout.stitched_column[mine]
    return Pane("crops", canvas, _grid(row - row.min(), column - column.min(), mine))


def _grid(row: Tensor, column: Tensor, token: Tensor) -> NDArray[np.int64]:
    tokens = np.full((int(row.max()) + 1, int(column.max()) + 1), ABSENT, dtype=np.int64)
    tokens[row.numpy(), column.numpy()] = token.numpy()
    return tokens
