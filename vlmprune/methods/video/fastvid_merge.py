"""The merging of FastVID: what is not kept goes into the centres of its scene's anchor frames."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.bipartite_match import bipartite_match
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.peak_scores import peak_scores
from vlmprune.kernels.segmented_topk import segmented_topk

# Tokens that a density is taken over.
NEIGHBOURS = 4


def local_to_video(local: Tensor, counts: Sequence[int], tokens: int) -> Tensor:
    """Turn indices inside frames of `tokens` tokens, `counts[f]` of each, into indices of the video."""
    frames = torch.arange(0, len(counts) * tokens, tokens, device=local.device)
    return local + frames.repeat_interleave(torch.tensor(counts, device=local.device), output_size=len(local))


def context_centres(features: Tensor, salient: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the density peaks of frames among the tokens that are not salient, int64 `[sum(counts)]`, ascending.

    Args:
        features: `[frames, tokens, dim]`.
        salient: bool `[frames, tokens]`.
        counts: centres per frame.
    """
    tokens = features.shape[1]
    anchor = torch.tensor([count > 0 for count in counts], device=features.device)
    free = (~salient & anchor[:, None]).flatten().nonzero().flatten()
    kept: list[int] = salient.sum(1).tolist()
    sizes = [tokens - held if count else 0 for held, count in zip(kept, counts, strict=True)]
    offsets = list(accumulate(sizes, initial=0))
    scores = peak_scores(features.flatten(0, 1)[free], offsets, [min(NEIGHBOURS, size) for size in sizes])
    local = segmented_topk(scores, offsets, counts)
    starts = torch.tensor(offsets[:-1], device=local.device)
    starts = starts.repeat_interleave(torch.tensor(counts, device=local.device), output_size=len(local))
    return free[local + starts]


class Merged(NamedTuple):
    """The centres of a video after merging.

    Attributes:
        values: fp32 `[centres, dim]`.
        nearest: int64 `[frames * tokens]`, of the centres that a token's value went into the one it is most like; -1 for none.
    """

    values: Tensor
    nearest: Tensor


def merge_into_centres(
    features: Tensor,
    salient: Tensor,
    centres: Tensor,
    counts: Sequence[int],
    lengths: Sequence[int],
    alone: Sequence[bool],
    beta: float,
    with_centres: bool,
) -> Merged:
    """Merge the tokens of every scene into the centres of each of its anchor frames.

    Every token goes, once for each anchor frame, to the centre of highest cosine. A centre with `m` tokens becomes `w` times
    itself and `1 - w` times their mean, `w` the larger of `1 / (m + 1)` and `beta`.

    Args:
        features: `[frames, tokens, dim]`.
        salient: bool `[frames, tokens]`, which are merged into nothing.
        centres: int64, indices of the video, ascending.
        counts: centres per frame.
        lengths: frames per scene.
        alone: whether the anchors of a scene take tokens of their own frame only.
        beta: least weight of a centre.
        with_centres: whether an anchor's own centres count among the tokens that are merged.
    """
    frames, tokens, dim = features.shape
    device = features.device
    packed, offsets = features.flatten(0, 1), list(accumulate(counts, initial=0))
    values = torch.zeros(len(centres), dim, device=device)
    nearest = torch.full((frames * tokens,), -1, device=device)
    closeness = torch.full((frames * tokens,), -torch.inf, device=device)
    first = 0
    for length, by_frame in zip(lengths, alone, strict=True):
        scene = slice(first * tokens, (first + length) * tokens)
        pool = rows = None
        for frame in range(first, first + length):
            if not counts[frame]:
                continue
            if by_frame:
                pool = rows = None
                scene = slice(frame * tokens, (frame + 1) * tokens)
            if pool is None:
                pool = (~salient.flatten()[scene]).nonzero().flatten() + scene.start
                rows = packed[pool]
            assert rows is not None
            mine = slice(offsets[frame], offsets[frame + 1])
            own = centres[mine]
            partner, cosine = bipartite_match(rows, packed[own], (0, len(rows)), (0, len(own)))
            if not with_centres:
                partner = partner.masked_fill(torch.isin(pool, own), -1)
            mean, number = merge_scatter(rows, partner, None, len(own), out_dtype=torch.float32)
            weight = (1 / (number + 1)).clamp(min=beta)[:, None].masked_fill(number[:, None] == 0, 1.0)
            values[mine] = weight * packed[own].float() + (1 - weight) * mean
            closer = (cosine > closeness[pool]) & (partner >= 0)
            nearest[pool] = torch.where(closer, partner + mine.start, nearest[pool])
            closeness[pool] = torch.where(closer, cosine, closeness[pool])
        first += length
    return Merged(values, nearest.index_copy_(0, centres, torch.arange(len(centres), device=device)))
