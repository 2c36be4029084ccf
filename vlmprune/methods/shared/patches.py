"""The patches of a batch without its newlines, and a selection from picks among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import Selection, VisualBatch

from .tile_segments import local_indices, newline_surplus, tile_segments, to_device


@dataclass(frozen=True, eq=False)
class Patches:
    """The visual tokens of a batch that are no newlines.

    Attributes:
        indices: int64 `[patches]` on the CPU, their packed indices, in the order of the language model.
        newlines: int64 on the CPU, packed indices of the others.
        counts: patches per image.
    """

    indices: Tensor
    newlines: Tensor
    counts: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of each image in `indices`, and the end of the last."""
        return tuple(accumulate(self.counts, initial=0))


@lru_cache(maxsize=64)
def patches_of(layouts: tuple[VisualLayout, ...]) -> Patches:
    """Return the patches of images with these layouts."""
    newline = torch.cat([layout.newline for layout in layouts])
    counts = tuple(layout.total - int(layout.newline.sum()) for layout in layouts)
    return Patches((~newline).nonzero().flatten(), newline.nonzero().flatten(), counts)


def patch_budgets(batch: VisualBatch) -> tuple[int, ...]:
    """Return how many patches of each image are kept: its budget, or all of them where it has fewer."""
    return tuple(min(pair) for pair in zip(batch.budgets, patches_of(batch.layouts).counts, strict=True))


def select_patches(picks: Tensor, batch: VisualBatch, scores: Tensor | None = None) -> Selection:
    """Return the selection of `picks`, local int64 indices `[sum(patch_budgets)]` among the patches of each image, in any order.

    `scores [patches]` are what they were ranked by, for the record. Newlines fill what is left of a budget, the first of an
    image first. Kept tokens are in position order.
    """
    device, patches = picks.device, patches_of(batch.layouts)
    counts = torch.tensor(patch_budgets(batch))
    first = torch.tensor(patches.offsets[:-1]).repeat_interleave(counts)
    packed = to_device(patches.indices, device)[picks + to_device(first, device)]
    segments = tile_segments(batch.layouts)
    surplus = newline_surplus(segments, batch.budgets)
    if int(surplus.sum()):
        starts = (segments.sizes[:, -1].cumsum(0) - segments.sizes[:, -1]).tolist()
        extra = [patches.newlines[start : start + count] for start, count in zip(starts, surplus.tolist(), strict=True)]
        packed = torch.cat([packed, to_device(torch.cat(extra), device)])
    if scores is not None:
        ranked = scores.new_full((sum(batch.counts),), torch.nan, dtype=torch.float32)
        scores = ranked.index_copy_(0, to_device(patches.indices, device), scores.float())
    return Selection(local_indices(packed.sort().values, segments, batch.budgets), batch.budgets, scores=scores)
