"""Pool: 2-D average pooling of the token grid, the honest cheap baseline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.needs import GRID, Need
from vlmprune.methods.picture_method import PictureMethod
from vlmprune.methods.selection_macs import Scored


@dataclass(frozen=True, kw_only=True)
class Pool(PictureMethod):
    """Average-pool the token grid to the nearest smaller grid of at most `keep` tokens.

    The pooled grid keeps the shape of the image as well as the count allows, so it can hold a few tokens fewer than the
    budget (58 of a 24 x 24 grid become 7 x 8). A pooled token takes the position of the token in the middle of its cell.
    Of a video every frame is pooled with an even share of the budget.
    """

    name: ClassVar[str] = "pool"
    needs: ClassVar[frozenset[Need]] = frozenset({GRID})
    merges: ClassVar[bool] = True

    def kept_count(self, total: int, grid: tuple[int, int] | None = None) -> int | None:
        """Return the cells of the pooled grid."""
        budget = self.budget(total)
        # An image of the call that is not pooled is whole.
        return prod(pooled_grid(*grid, budget)) if grid is not None and budget < total else budget

    def select(self, batch: VisualBatch) -> Selection:
        """Pool each image's grid."""
        grids = [layout.grid for layout in batch.layouts if layout.grid is not None]
        if len(grids) != len(batch.layouts):
            unknown = [total for total, layout in zip(batch.counts, batch.layouts, strict=True) if layout.grid is None]
            raise UnsupportedCallError(
                f"'pool' needs {GRID.sentence}; this call has images of {unknown} visual tokens whose geometry is unknown."
            )
        targets = [pooled_grid(*grid, budget) for grid, budget in zip(grids, batch.budgets, strict=True)]

        def merge(values: Tensor) -> Tensor:
            pooled = []
            for image, grid, target in zip(values.split(list(batch.counts)), grids, targets, strict=True):
                plane = image.float().T.reshape(1, -1, *grid)
                pooled.append(adaptive_avg_pool2d(plane, target)[0].flatten(1).T.to(values.dtype))
            return torch.cat(pooled)

        kept = [cell_centres(*grid, *target) for grid, target in zip(grids, targets, strict=True)]
        indices = torch.cat(kept).to(batch.features.device, non_blocking=True)
        counts = tuple(rows * columns for rows, columns in targets)
        groups = torch.cat([cell_of(*grid, *target) for grid, target in zip(grids, targets, strict=True)])
        return Selection(indices, counts, merge(batch.features), merge, groups.to(indices.device, non_blocking=True))

    def feature_macs(self, scored: Scored) -> int:
        """Pooling counts as nothing, here as in the models."""
        return 0


@lru_cache(maxsize=256)
def pooled_grid(rows: int, columns: int, budget: int) -> tuple[int, int]:
    """Return the grid of at most `budget` cells nearest to the budget whose shape stays near that of `rows` x `columns`.

    Among the grids whose aspect ratio is within 1.5 times the image's, the largest wins, then the one nearest in shape;
    where none is that near in shape, the nearest in shape wins.
    """
    best: tuple[tuple[float, ...], tuple[int, int]] | None = None
    for new_rows in range(1, min(rows, budget) + 1):
        new_columns = min(columns, budget // new_rows)
        for width in {new_columns, max(1, min(new_columns, round(new_rows * columns / rows)))}:
            ratio = (new_rows * columns) / (width * rows)
            distortion = max(ratio, 1 / ratio)
            near = distortion <= 1.5
            rank = (1.0, new_rows * width, -distortion) if near else (0.0, -distortion, new_rows * width)
            if best is None or rank > best[0]:
                best = (rank, (new_rows, width))
    return best[1] if best else (1, 1)


@lru_cache(maxsize=256)
def cell_centres(rows: int, columns: int, new_rows: int, new_columns: int) -> Tensor:
    """Return the raster index of the middle token of every pooled cell, `[new_rows * new_columns]` int64, ascending."""

    def middles(size: int, cells: int) -> Tensor:
        start = torch.arange(cells) * size // cells
        end = -((-(torch.arange(cells) + 1) * size) // cells)
        return (start + end - 1) // 2

    return (middles(rows, new_rows)[:, None] * columns + middles(columns, new_columns)).flatten()


@lru_cache(maxsize=256)
def cell_of(rows: int, columns: int, new_rows: int, new_columns: int) -> Tensor:
    """Return a pooled cell that each token of the grid lies in, `[rows * columns]` int64; the first where cells overlap."""

    def cells(size: int, number: int) -> Tensor:
        place = torch.arange(size)
        cell = place * number // size
        # Cells end at the upper rounding, so the one before may reach this far.
        before = (cell - 1).clamp(min=0)
        return torch.where(-(-(before + 1) * size // number) > place, before, cell)

    return (cells(rows, new_rows)[:, None] * new_columns + cells(columns, new_columns)).flatten()
