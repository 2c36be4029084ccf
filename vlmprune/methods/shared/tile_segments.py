"""The tiles of a batch as segments, and the best tokens of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.layout import VisualLayout
from vlmprune.methods.baselines.uniform import even_steps
from vlmprune.methods.batch import Selection, VisualBatch

from .apportion import apportion


@dataclass(frozen=True, eq=False)
class TileSegments:
    """The tokens of a batch grouped by image and tile.

    Every image has the same number of segments: the thumbnail (or the whole image), its crops row by row, and its
    newlines.

    Attributes:
        order: int64 `[tokens]` on the CPU, the packed index of every token, segment after segment.
        segment: int64 `[tokens]` on the CPU, the segment of every packed token.
        sizes: int64 `[images, tiles + 1]` on the CPU, tokens per segment; 0 where an image has fewer tiles.
    """

    order: Tensor
    segment: Tensor
    sizes: Tensor

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each segment in `order`, and the end of the last."""
        return tuple(accumulate(self.sizes.flatten().tolist(), initial=0))

    @property
    def patches(self) -> Tensor:
        """Patch tokens per image: int64 `[images]`."""
        return self.sizes[:, :-1].sum(-1)


@lru_cache(maxsize=64)
def tile_segments(layouts: tuple[VisualLayout, ...]) -> TileSegments:
    """Return the segments of images with these layouts."""
    width = max(layout.crops[0] * layout.crops[1] if layout.crops else 0 for layout in layouts) + 2
    segment = torch.cat(
        [torch.where(layout.newline, width - 1, layout.tile) + image * width for image, layout in enumerate(layouts)]
    )
    sizes = torch.bincount(segment, minlength=len(layouts) * width).view(len(layouts), width)
    return TileSegments(segment.argsort(stable=True), segment, sizes)


def top_of_segments(scores: Tensor, segments: TileSegments, k: Tensor, totals: tuple[int, ...]) -> Selection:
    """Return the `k[image, segment]` highest `scores [tokens]` of every segment, in position order.

    Args:
        k: int64 like `segments.sizes`, on any device; each row sums to its entry of `totals`.
        totals: kept tokens per image.
    """
    device, total = scores.device, sum(totals)
    order = to_device(segments.order, device)
    starts = to_device(torch.tensor(segments.offsets), device)
    # Counts that only the device knows go with offsets on the device, so that the host need not wait for either.
    on_host = k.device.type == "cpu"
    offsets, counts = (segments.offsets, k.flatten()) if on_host else (starts, k.flatten())
    local = segmented_topk(scores[order], offsets, counts, total=total)
    starts = starts[:-1].repeat_interleave(to_device(counts, device), output_size=total)
    packed = order[local + starts].sort().values
    return Selection(local_indices(packed, segments, totals), totals, scores=scores)


def local_indices(packed: Tensor, segments: TileSegments, totals: tuple[int, ...]) -> Tensor:
    """Turn ascending packed indices, `totals[i]` of each image, into indices local to their image."""
    images = segments.sizes.sum(-1)
    first = (images.cumsum(0) - images).repeat_interleave(torch.tensor(totals))
    return packed - to_device(first, packed.device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy host values without making the host wait for the device's queued work."""
    pin = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if pin else values).to(device, non_blocking=True)


def newline_surplus(segments: TileSegments, budgets: tuple[int, ...]) -> Tensor:
    """Return how many newlines must fill each image's budget because it has too few patches: int64 `[images]`."""
    return (torch.tensor(budgets) - segments.patches).clamp(min=0)


def select_evenly(scores: Tensor, batch: VisualBatch) -> Selection:
    """Return the highest `scores [tokens]` of every image, an equal number in each of its tiles.

    A tile with fewer tokens than that leaves its share to the others; newlines come last.
    """
    if all(layout.crops is None for layout in batch.layouts):
        return Selection(segmented_topk(scores, batch.offsets, batch.budgets), batch.budgets, scores=scores)
    segments = tile_segments(batch.layouts)
    return top_of_segments(scores, segments, even_counts(segments, batch.budgets), batch.budgets)


def even_counts(segments: TileSegments, budgets: tuple[int, ...]) -> Tensor:
    """Return the tokens that each segment keeps if every tile of an image keeps the same number: int64 `[images, tiles + 1]`.

    A tile with fewer tokens than that leaves its share to the others; newlines come last.
    """
    newlines = newline_surplus(segments, budgets)
    tiles = segments.sizes[:, :-1]
    per_tile = apportion(torch.tensor(budgets) - newlines, (tiles > 0).double(), tiles)
    return torch.cat([per_tile, newlines[:, None]], dim=1)


def spread_newlines(scores: Tensor, segments: TileSegments, kept: Tensor) -> Tensor:
    """Return the scores with those of the newlines set so that the `kept [images]` best of an image are evenly spaced."""
    sizes = segments.sizes[:, -1]
    if bool(((kept == sizes) | (kept == 0)).all()):
        return scores
    width, newlines, chosen = segments.sizes.shape[1], [], []
    for image, (size, count) in enumerate(zip(sizes.tolist(), kept.tolist(), strict=True)):
        start = segments.offsets[image * width + width - 1]
        members = segments.order[start : start + size]
        newlines.append(members)
        chosen.append(members[even_steps(size, count)] if count else members[:0])
    scores = scores.index_fill(0, to_device(torch.cat(newlines), scores.device), 0.0)
    return scores.index_fill_(0, to_device(torch.cat(chosen), scores.device), 1.0)
