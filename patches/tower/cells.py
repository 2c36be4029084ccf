"""Towers over equally large tiles whose patches become visual tokens by cells (pixel shuffle)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.methods.batch import VisionSignal

from ..calls import CallStack, TowerCall
from ..hooks import HookSet
from .dense import DenseTowerReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..families.family import Family


def cell_means(patches: Tensor, side: int) -> Tensor:
    """Return the mean of each cell of `side` x `side` patches of square tiles.

    Args:
        patches: `[tiles, patches, channels]`, row by row.
        side: patches along the side of a cell.

    Returns:
        `[tiles, cells, channels]`, row by row.
    """
    cells = round(patches.shape[1] ** 0.5) // side
    return patches.unflatten(1, (cells, side, cells, side)).mean((2, 4)).flatten(1, 2)


class CellTowerReader(DenseTowerReader):
    """Reads as of any such tower, patch by patch; keys are averaged by cell before the mean query asks for them."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.leading = 0

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register hooks on the projections of every layer, and on what gives the features."""
        super().install(family, signals, calls, hooks)
        self.leading = int(family.tower_facts.has_cls)

    def read(self, signal: VisionSignal, call: TowerCall) -> Tensor:
        """Return `[tiles, tokens, channels]`; of "cls_features" `[tiles, channels]`, a cell of CLS tokens alone."""
        values = super().read(signal, call)
        return values.repeat(1, self.side**2) if signal.kind == "cls_features" else values

    def _scores(self, signal: VisionSignal, query: Tensor | None, key: Tensor, valid: Tensor | None = None) -> Tensor:
        if signal.kind == "mean_query_attention":
            cells: Any = cell_means(key[:, self.leading :].float(), self.side)
            key = torch.cat([key[:, : self.leading].float(), cells], 1)
        return super()._scores(signal, query, key, valid)
