"""Where each visual token of an image lies: tile, row, column, newline, frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VisualLayout:
    """Geometry of one image's visual tokens, in the order in which the language model sees them.

    All tensors are int64 (bool for `newline`) on the CPU with shape `[tokens]`; -1 stands where a coordinate does not exist.

    Attributes:
        tile: index of the tile; 0 is the thumbnail, or the whole image where it is not cut in tiles.
        row: row inside the tile.
        column: column inside the tile.
        stitched_row: row in the image stitched from all crops (the same as `row` for an uncut image; -1 in a thumbnail).
        stitched_column: column in the stitched image.
        newline: whether the token is a learned newline and not a patch.
        frame: index of the video frame; 0 for images.
        grid: `(rows, columns)` where the tokens are one plain raster, else None.
        tile_grid: `(rows, columns)` of one full tile.
        crops: `(rows, columns)` of the crops; None for an uncut image.
    """

    tile: Tensor
    row: Tensor
    column: Tensor
    stitched_row: Tensor
    stitched_column: Tensor
    newline: Tensor
    frame: Tensor
    grid: tuple[int, int] | None = None
    tile_grid: tuple[int, int] | None = None
    crops: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        """Number of visual tokens."""
        return self.tile.numel()

    @property
    def frames(self) -> int:
        """Number of frames, temporal patches where the tower merges frames; 1 for images."""
        return int(self.frame[-1]) + 1 if self.total else 0


@lru_cache(maxsize=256)
def raster_layout(rows: int, columns: int, frames: int = 1) -> VisualLayout:
    """Return the layout of an uncut image whose tokens are a plain raster of `rows` x `columns`, or of a video of such frames."""
    row = torch.arange(rows).repeat_interleave(columns).repeat(frames)
    column = torch.arange(columns).repeat(rows * frames)
    zeros = torch.zeros_like(row)
    return VisualLayout(
        tile=zeros,
        row=row,
        column=column,
        stitched_row=row,
        stitched_column=column,
        newline=zeros.bool(),
        frame=torch.arange(frames).repeat_interleave(rows * columns),
        grid=(rows, columns) if frames == 1 else None,
        tile_grid=(rows, columns),
    )


@lru_cache(maxsize=256)
def unknown_layout(total: int) -> VisualLayout:
    """Return the layout of `total` visual tokens of which no geometry is known (a CLS token among the features, say)."""
    absent = torch.full((total,), -1)
    zeros = torch.zeros_like(absent)
    return VisualLayout(
        tile=zeros,
        row=absent,
        column=absent,
        stitched_row=absent,
        stitched_column=absent,
        newline=zeros.bool(),
        frame=zeros,
    )
