"""The frames of a video in pieces, so that no method needs all of them in another dtype at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from vlmprune.methods.batch import VisualBatch

# Frames that are cast to fp32 at a time.
FRAMES_AT_A_TIME = 8


def videos_of(batch: VisualBatch) -> Iterator[Tensor]:
    """Yield the features of each video of a batch, `[frames, tokens, dim]`, views in the model's dtype."""
    for (begin, end), layout in zip(pairwise(batch.offsets), batch.layouts, strict=True):
        yield batch.features[begin:end].unflatten(0, (layout.frames, -1))


def frame_pieces(video: Tensor, size: int = FRAMES_AT_A_TIME) -> Iterator[tuple[slice, Tensor]]:
    """Yield which frames of `video [frames, tokens, dim]` a piece has, and these in fp32."""
    for begin in range(0, len(video), size):
        frames = slice(begin, min(begin + size, len(video)))
        yield frames, video[frames].float()
