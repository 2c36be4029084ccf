"""What a method keeps of each video, put together as the answer for a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection, VisualBatch


class VideoRows(NamedTuple):
    """What is kept of one video.

    Attributes:
        kept: int64 `[kept]`, indices into the video's tokens, ascending.
        values: `[kept, dim]`, what the kept tokens are from now on.
        groups: int64 `[tokens]`, the place in `kept` that each token's value went into, -1 where it is dropped.
    """

    kept: Tensor
    values: Tensor
    groups: Tensor


def in_position_order(kept: Tensor, values: Tensor, groups: Tensor) -> VideoRows:
    """Sort rows by position; `groups` counts them in the order in which they are given."""
    order = kept.argsort(stable=True)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return VideoRows(kept[order], values[order], torch.where(groups < 0, groups, place[groups.clamp(min=0)]))


def select_videos(batch: VisualBatch, select: Callable[[int], VideoRows]) -> Selection:
    """Return the selection of a batch of videos, each of them chosen by `select(number)`.

    Values that the model adds to the visual tokens later on (DeepStack) are those of the kept tokens themselves.
    """
    videos = [select(video) for video in range(len(batch.counts))]
    packed = torch.cat([rows.kept + start for rows, start in zip(videos, batch.offsets, strict=False)])

    def merge(deep: Tensor) -> Tensor:
        # As the official codes do: what joins the visual tokens later on is not merged.
        return deep[packed.to(deep.device)]

    return Selection(
        kept=torch.cat([rows.kept for rows in videos]),
        counts=tuple(len(rows.kept) for rows in videos),
        features=torch.cat([rows.values for rows in videos]).to(batch.features.dtype),
        merge=merge,
        groups=torch.cat([rows.groups for rows in videos]),
    )


def frames_of(batch: VisualBatch, video: int) -> tuple[Tensor, slice]:
    """Return the features `[frames, frame tokens, dim]` of one video, and its place among the packed tokens."""
    span = slice(batch.offsets[video], batch.offsets[video + 1])
    return batch.features[span].unflatten(0, (batch.layouts[video].frames, -1)), span
