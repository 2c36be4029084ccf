"""The order in which GlobalCom2's official code feeds the kept tokens to the language model."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.errors import BudgetError
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.shared.tile_segments import to_device


def official_order(batch: VisualBatch, selection: Selection, scores: Tensor) -> Selection:
    """Put the kept tokens of tiled images in the official order, as values in the positions of the selection.

    The thumbnail comes in the order of `scores [tokens]`. A kept token of a crop lies where its rank among the crop's
    tokens that are no padding would lie in a full crop; every row of the full stitched crops ends with a newline.

    Raises:
        BudgetError: the image has fewer tokens than the official sequence.
    """
    kept, values = [], []
    spans = zip(batch.offsets, batch.offsets[1:], strict=False)
    choices = selection.kept.split(list(selection.counts))
    for (start, end), layout, chosen in zip(spans, batch.layouts, choices, strict=True):
        features = batch.features[start:end]
        sequence = official_sequence(layout, chosen.cpu(), scores[start:end].cpu())
        kept.append(to_device(_positions(layout.total, chosen.cpu(), len(sequence)), chosen.device))
        values.append(features[to_device(sequence, chosen.device)])
    return Selection(torch.cat(kept), tuple(len(tokens) for tokens in kept), torch.cat(values))


def official_sequence(layout: VisualLayout, chosen: Tensor, scores: Tensor) -> Tensor:
    """Return the chosen tokens of a tiled image in the official order, int64 `[sequence]`; newlines by the first newline's index.

    Args:
        chosen: int64 `[kept]`, ascending; its newlines are not looked at.
        scores: `[tokens]` of the image.
    """
    if layout.crops is None or layout.tile_grid is None:
        return chosen
    (rows, columns), (height, width) = layout.crops, layout.tile_grid
    patches = chosen[~layout.newline[chosen]]
    thumbnail = patches[layout.tile[patches] == 0]
    thumbnail = thumbnail[scores[thumbnail].argsort(descending=True, stable=True)]
    crops = patches[layout.tile[patches] > 0]
    rank = torch.zeros_like(layout.tile)
    for index in range(1, rows * columns + 1):
        members = (layout.tile == index) & ~layout.newline
        rank[members] = torch.arange(int(members.sum()))
    tile, place = layout.tile[crops] - 1, rank[crops]
    row = tile // columns * height + place // width
    column = tile % columns * width + place % width
    stride = columns * width + 1
    newline_rows = torch.arange(rows * height if bool(layout.newline.any()) else 0)
    newlines = layout.newline.nonzero().flatten()[:1].expand(len(newline_rows))
    places = torch.cat([row * stride + column, newline_rows * stride + stride - 1])
    return torch.cat([thumbnail, torch.cat([crops, newlines])[places.argsort(stable=True)]])


def _positions(total: int, chosen: Tensor, length: int) -> Tensor:
    """Return `length` ascending positions: those chosen, and the first others where the sequence is longer."""
    if length > total:
        raise BudgetError(
            f"GlobalCom2's official order has {length} visual tokens for an image of {total}; take a smaller keep, "
            'or order="position".'
        )
    taken = torch.zeros(total, dtype=torch.bool)
    taken[chosen[:length]] = True
    taken[(~taken).nonzero().flatten()[: max(0, length - len(chosen))]] = True
    return taken.nonzero().flatten()
