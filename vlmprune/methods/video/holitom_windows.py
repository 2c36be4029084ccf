"""The steps of HoliTom on one video: windows of frames with still places, and clusters of these."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.nearest_centre import nearest_centre
from vlmprune.kernels.peak_scores import peak_scores
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.shared.frames import frame_pieces


class Windows(NamedTuple):
    """A video in windows of frames.

    Attributes:
        lengths: frames per window.
        still: bool `[windows, tokens]`, the places that stay alike through all frames of a window; none in one of one frame.
        saved: tokens that are saved if every such place is kept once a window.
    """

    lengths: tuple[int, ...]
    still: Tensor
    saved: int


def holitom_windows(features: Tensor, threshold: float, longest: int) -> Windows:
    """Return the windows that save most tokens; of equally good ones the shortest at the end, as in the official code.

    Args:
        features: `[frames, tokens, dim]`.
        threshold: cosine to the same place in the next frame above which a place is still.
        longest: frames of a window at most.
    """
    frames = len(features)
    runs = _still_runs(features, threshold)
    reach = min(longest, frames)
    # Places that are still through the last `width` frames before and at each frame.
    lasting = torch.stack([(runs >= width - 1).sum(1) for width in range(1, reach + 1)], dim=1).tolist()
    best, chosen = [0], []
    for frame in range(frames):
        most, width = best[frame], 1
        for candidate in range(2, min(frame + 1, reach) + 1):
            saved = best[frame + 1 - candidate] + lasting[frame][candidate - 1] * (candidate - 1)
            if saved > most:
                most, width = saved, candidate
        best.append(most)
        chosen.append(width)
    lengths: list[int] = []
    frame = frames
    while frame:
        lengths.append(chosen[frame - 1])
        frame -= lengths[-1]
    lengths.reverse()
    ends = torch.tensor(lengths).cumsum(0) - 1
    steps = torch.tensor(lengths, device=runs.device)[:, None] - 1
    still = (runs[ends.to(runs.device)] >= steps) & (steps > 0)
    return Windows(tuple(lengths), still, best[-1])


def _still_runs(features: Tensor, threshold: float) -> Tensor:
    """Return for how many frames before each one a place has been still, int64 `[frames, tokens]`."""
    alike = [torch.zeros(1, features.shape[1], dtype=torch.bool, device=features.device)]
    for frames, piece in frame_pieces(features[:-1]):
        following = features[frames.start + 1 : frames.stop + 1].float()
        alike.append(cosine_similarity(piece, following, dim=-1) > threshold)
    still = torch.cat(alike)
    place = torch.arange(len(still), device=features.device)[:, None]
    broken = torch.where(still, -1, place).cummax(0).values
    return place - broken


class StillTokens(NamedTuple):
    """The clusters of the still places of all windows.

    Attributes:
        centres: int64 `[clusters]`, the centre of each as an index into the video's tokens, in the first frame of its window.
        values: fp32 `[clusters, dim]`.
        groups: int64 `[frames * tokens]`, the cluster of every token of a still place, -1 for others.
    """

    centres: Tensor
    values: Tensor
    groups: Tensor


def merge_still_places(
    features: Tensor, windows: Windows, counts: Sequence[int], beta: float, neighbours: int
) -> StillTokens:
    """Average still places over their window, and put those of each window in clusters around density peaks.

    Args:
        features: `[frames, tokens, dim]`.
        windows: the windows.
        counts: clusters per window.
        beta: share of the centre in its cluster's value; the mean of the others has the rest.
        neighbours: tokens that a density is taken over, at most.
    """
    frames, tokens, dim = features.shape
    device = features.device
    lengths = torch.tensor(windows.lengths, device=device)
    first = lengths.cumsum(0) - lengths
    window, place = windows.still.nonzero(as_tuple=True)
    means = [
        part[:, still].float().mean(0)
        for part, still in zip(features.split(list(windows.lengths)), windows.still, strict=True)
    ]
    values = torch.cat(means) if means else torch.zeros(0, dim, device=device)
    sizes: list[int] = windows.still.sum(1).tolist()
    offsets = list(accumulate(sizes, initial=0))
    near = [min(neighbours, count) or min(1, size) for count, size in zip(counts, sizes, strict=True)]
    centres = segmented_topk(peak_scores(values, offsets, near), offsets, counts)
    assigned = nearest_centre(values, offsets, centres, list(accumulate(counts, initial=0)))
    starts = torch.tensor(offsets[:-1], device=device).repeat_interleave(
        torch.tensor(counts, device=device), output_size=len(centres)
    )
    rows = centres + starts
    others = assigned.index_fill(0, rows, -1)
    mean, number = merge_scatter(values, others, None, len(rows))
    own = values[rows]
    merged = torch.where(number[:, None] > 0, beta * own + (1 - beta) * mean, own)
    numbers = torch.full(windows.still.shape, -1, device=device)
    numbers[window, place] = assigned
    groups = numbers.repeat_interleave(lengths, dim=0, output_size=frames).flatten()
    return StillTokens(first[window[rows]] * tokens + place[rows], merged, groups)
