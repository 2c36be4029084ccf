"""Uniform: evenly spaced tokens of the grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import Need
from vlmprune.methods.selection_macs import Scored


@dataclass(frozen=True, kw_only=True)
class Uniform(InputMethod):
    """Keep evenly spaced tokens: evenly spaced rows of the grid, and columns in each.

    Of a video every frame gets its share, or evenly spaced frames one token each if there are not enough. Where there is no
    plain grid the tokens are evenly spaced in the sequence.
    """

    name: ClassVar[str] = "uniform"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` evenly spaced tokens of each image."""
        kept = [_even_tokens(layout, budget) for budget, layout in zip(batch.budgets, batch.layouts, strict=True)]
        return Selection(torch.cat(kept).to(batch.features.device, non_blocking=True), batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """Nothing is computed."""
        return 0


def _even_tokens(layout: VisualLayout, budget: int) -> Tensor:
    if layout.grid is not None:
        return even_grid(*layout.grid, budget)
    frames = int(layout.frame[-1]) + 1
    patches = layout.total - int(layout.newline.sum())
    if frames > 1 and layout.tile_grid is not None and patches == frames * layout.tile_grid[0] * layout.tile_grid[1]:
        places = (~layout.newline).nonzero().flatten()
        chosen = even_frames(frames, *layout.tile_grid, min(budget, patches))
        newlines = layout.newline.nonzero().flatten()[: budget - len(chosen)]
        return torch.cat([places[chosen], newlines]).sort().values
    return even_steps(layout.total, budget)


@lru_cache(maxsize=256)
def even_frames(frames: int, rows: int, columns: int, budget: int) -> Tensor:
    """Return `budget` indices spread evenly over `frames` rasters of `rows` x `columns`; int64, ascending."""
    used = even_steps(frames, min(frames, budget)).tolist()
    share, rest = divmod(budget, len(used))
    larger = set(even_steps(len(used), rest).tolist()) if rest else set()
    return torch.cat(
        [frame * rows * columns + even_grid(rows, columns, share + (i in larger)) for i, frame in enumerate(used)]
    )


@lru_cache(maxsize=256)
def even_steps(count: int, budget: int) -> Tensor:
    """Return `budget` indices in `[0, count)`, the middles of equal steps; int64, ascending."""
    return ((2 * torch.arange(budget) + 1) * count) // (2 * budget)


@lru_cache(maxsize=256)
def even_grid(rows: int, columns: int, budget: int) -> Tensor:
    """Return exactly `budget` raster indices spread evenly over a grid of `rows` x `columns`; int64, ascending."""
    used_rows = min(rows, max(round((budget * rows / columns) ** 0.5), -(-budget // columns), 1))
    per_row, longer_rows = divmod(budget, used_rows)
    longer = set(even_steps(used_rows, longer_rows).tolist()) if longer_rows else set()
    picks = [
        row * columns + even_steps(columns, per_row + (index in longer))
        for index, row in enumerate(even_steps(rows, used_rows).tolist())
        if per_row + (index in longer)
    ]
    return torch.cat(picks)
