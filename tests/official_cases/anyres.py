"""Visual token layouts of anyres images (thumbnail, crops, newlines), with the integer arithmetic of the official codes."""

from __future__ import annotations

import torch
from transformers.image_processing_utils import select_best_resolution

from vlmprune.layout import VisualLayout

# LLaVA-NeXT's resolutions in tiles, (rows, columns).
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def best_crops(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return the rows and columns of crops that LLaVA-NeXT chooses for an image of this size."""
    best = select_best_resolution((height, width), [[rows * tile, columns * tile] for rows, columns in PINPOINTS])
    return best[0] // tile, best[1] // tile


def anyres_layout(
    crops: tuple[int, int], side: int, height: int, width: int, *, unpad: bool = True, newlines: bool = True
) -> VisualLayout:
    """Return the layout of an image of `height` x `width` pixels in `crops` of `side` x `side` tokens."""
    rows, columns = crops
    top, bottom, left, right = 0, rows * side, 0, columns * side
    if unpad and width / height > right / bottom:
        padding = (bottom - int(height * right / width)) // 2
        top, bottom = padding, bottom - padding
    elif unpad:
        padding = (right - int(width * bottom / height)) // 2
        left, right = padding, right - padding
    thumbnail = torch.cartesian_prod(torch.arange(side), torch.arange(side)).T
    row, column = torch.cartesian_prod(torch.arange(top, bottom), torch.arange(left, right + newlines)).T
    newline = column == right if newlines else torch.zeros_like(column, dtype=torch.bool)
    absent = torch.full((side * side,), -1)

    def joined(of_thumbnail: torch.Tensor, of_crops: torch.Tensor) -> torch.Tensor:
        return torch.cat([of_thumbnail, of_crops.masked_fill(newline, -1)])

    return VisualLayout(
        tile=torch.cat([torch.zeros_like(absent), 1 + row // side * columns + (column - newline.int()) // side]),
        row=joined(thumbnail[0], row % side),
        column=joined(thumbnail[1], column % side),
        stitched_row=joined(absent, row),
        stitched_column=joined(absent, column),
        newline=torch.cat([absent == 0, newline]),
        frame=torch.zeros(side * side + len(row), dtype=torch.int64),
        tile_grid=(side, side),
        crops=crops,
    )
