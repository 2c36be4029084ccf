"""The steps of FlashVID on one video: scenes, tokens picked in each frame, trees over time, clusters in space."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.kernels.max_min import max_min
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.nearest_centre import nearest_centre
from vlmprune.kernels.peak_scores import peak_scores
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.shared.apportion import apportion
from vlmprune.methods.shared.frame_segments import lengths_between, neighbour_cosines, segment_starts

Picking = Literal["attention_diversity", "attention_diversity_relevance", "diversity", "attention"]

# Elements of the cosines of neighbouring frames that are held at a time.
_BLOCK_ELEMENTS = 2**22

# The lowest value that still merges, as in the official code, where -1 stands for a token that may not.
_LEAST = -1 + 1e-6


def flashvid_segments(
    features: Tensor, threshold: float | None, minimum: int = 1, complementary: bool = True
) -> tuple[int, ...]:
    """Return the lengths of the scenes of a video: it is cut where the mean tokens of two frames are unlike.

    Args:
        features: `[frames, tokens, dim]`.
        threshold: cosine below which there is a cut; None for one scene.
        minimum: scenes that there should be at least.
        complementary: whether the least alike of the other neighbours are cut too where there are fewer.
    """
    frames = len(features)
    if threshold is None or frames == 1:
        return (frames,)
    alike: list[float] = neighbour_cosines(features.float().mean(1)).tolist()
    cuts = [frame for frame, cosine in enumerate(alike) if cosine < threshold]
    missing = minimum - len(cuts) - 1
    if complementary and missing > 0:
        others = sorted(set(range(frames - 1)) - set(cuts), key=alike.__getitem__)
        cuts += others[:missing]
    return lengths_between(cuts, frames)


def flashvid_picks(
    features: Tensor,
    attention: Tensor,
    counts: Sequence[int],
    lengths: Sequence[int],
    picking: Picking,
    repeats: bool = False,
) -> Tensor:
    """Return the tokens picked in every frame, int64 `[sum(counts)]`, local to their frame, ascending.

    Args:
        features: `[frames, tokens, dim]`.
        attention: fp32 `[frames, tokens]`.
        counts: picks per frame.
        lengths: frames per scene.
        picking: by what.
        repeats: whether the first pick of a frame is repeated where nothing else has a positive relevance, as in the official
            code.
    """
    frames, tokens, _ = features.shape
    offsets = range(0, frames * tokens + 1, tokens)
    if picking == "attention":
        return segmented_topk(attention.flatten(), offsets, counts)
    packed = features.flatten(0, 1)
    weights = torch.ones_like(attention) if picking == "diversity" else attention.float()
    relevance = None
    if picking == "attention_diversity_relevance":
        relevance = _relevance(features, lengths)
        weights = weights * relevance.clamp(min=0)
    apart = _nearest_in_frame(features)
    firsts = (weights * apart).argmax(1).tolist()
    picks = max_min(packed, offsets, counts, seeds=firsts, weights=weights.flatten())
    parts = list(picks.split(list(counts)))
    if repeats and relevance is not None:
        positive: list[int] = (relevance > 0).sum(1).tolist()
        for frame, (part, usable) in enumerate(zip(parts, positive, strict=True)):
            if 0 < usable < len(part):
                parts[frame] = torch.cat([part[:usable], part[:1].expand(len(part) - usable)])
    return torch.cat([part.sort().values for part in parts])


def _relevance(features: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the product of every token with the mean token of its scene, fp32 `[frames, tokens]`."""
    means = [scene.float().mean((0, 1)) for scene in features.split(list(lengths))]
    mine = torch.stack(means).repeat_interleave(torch.tensor(lengths, device=features.device), dim=0)
    return torch.stack([frame.float() @ mean for frame, mean in zip(features, mine, strict=True)])


def _nearest_in_frame(features: Tensor) -> Tensor:
    """Return the cosine distance of every token to the nearest other one of its frame, fp32 `[frames, tokens]`."""
    found = []
    for block in features.split(_frames_at_once(features)):
        unit = normalize(block.float(), dim=-1)
        cosines = torch.bmm(unit, unit.transpose(1, 2))
        cosines.diagonal(dim1=1, dim2=2).fill_(-1.0)
        found.append(1 - cosines.amax(2))
    return torch.cat(found)


def _frames_at_once(features: Tensor) -> int:
    _, tokens, dim = features.shape
    return max(1, _BLOCK_ELEMENTS // (tokens * max(tokens, dim)))


class Trees(NamedTuple):
    """Which tokens joined which of the frame before.

    Attributes:
        root: int64 `[frames * tokens]`, the token that each one ended up in.
        merged: bool `[frames, tokens]`, whether it joined another.
        children: fp32 `[frames * tokens]`, tokens that joined it directly.
    """

    root: Tensor
    merged: Tensor
    children: Tensor


def flashvid_trees(
    features: Tensor,
    free: Tensor,
    lengths: Sequence[int],
    threshold: float,
    budgets: Sequence[int],
    strict: bool = False,
) -> Trees:
    """Let tokens join the most similar token of the frame before, where they are similar enough.

    Args:
        features: `[frames, tokens, dim]`.
        free: bool `[frames, tokens]`, the tokens that take part.
        lengths: frames per scene; trees end where scenes do.
        threshold: cosine above which a token joins.
        budgets: per scene, the tokens that must be left, those that do not take part among them.
        strict: whether of tokens as similar as the first one too many none joins, as in the official code; else those
            with the lowest index.
    """
    frames, tokens, _ = features.shape
    device = features.device
    cosines = torch.full((frames, tokens), -1.0, device=device)
    partner = torch.zeros((frames, tokens), dtype=torch.int64, device=device)
    step = _frames_at_once(features)
    for begin in range(1, frames, step):
        end = min(begin + step, frames)
        unit = normalize(features[begin - 1 : end].float(), dim=-1)
        alike = torch.bmm(unit[1:], unit[:-1].transpose(1, 2))
        alike.masked_fill_(~free[begin - 1 : end - 1, None, :], -1.0)
        cosines[begin:end], partner[begin:end] = alike.max(2)
    cosines.masked_fill_(~free | segment_starts(lengths, device)[:, None], -1.0)
    merged = []
    for scene, budget in zip(cosines.split(list(lengths)), budgets, strict=True):
        merged.append(_merges(scene.flatten(), threshold, scene.numel() - budget, strict).view_as(scene))
    joins = torch.cat(merged)
    own = torch.arange(frames * tokens, device=device).view(frames, tokens)
    before = own - own % tokens - tokens + partner
    parent = torch.where(joins, before, own).flatten()
    children = torch.zeros(frames * tokens, device=device).scatter_add_(0, parent, joins.flatten().float())
    root = parent
    for _ in range(max(1, max(lengths) - 1).bit_length()):
        root = root[root]
    return Trees(root, joins, children)


def _merges(cosines: Tensor, threshold: float, most: int, strict: bool) -> Tensor:
    """Return which tokens of a scene join: those above the threshold, if no more than `most`, else the highest of them."""
    above = cosines > max(threshold, _LEAST)
    if most <= 0:
        return torch.zeros_like(above)
    values, order = cosines.sort(descending=True, stable=True)
    if strict:
        bar = torch.where(above.sum() > most, values[most - 1].clamp(min=_LEAST), cosines.new_tensor(threshold))
        return cosines > bar
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    # The one at the bar stays, as in the official code.
    return above & (rank < torch.where(above.sum() > most, most - 1, most))


class Clusters(NamedTuple):
    """What is left of the tokens that were not picked.

    Attributes:
        centres: int64 `[clusters]`, indices into the video's tokens.
        values: fp32 `[clusters, dim]`.
        groups: int64 `[frames * tokens]`, the cluster of every token, -1 for none.
    """

    centres: Tensor
    values: Tensor
    groups: Tensor


def flashvid_clusters(
    features: Tensor, trees: Trees, left: Tensor, lengths: Sequence[int], budgets: Sequence[int], faithful: bool = False
) -> Clusters:
    """Put the roots of the trees of every frame in clusters around density peaks, whose means go on.

    Args:
        features: `[frames, tokens, dim]`.
        trees: the trees.
        left: bool `[frames, tokens]`, the tokens that go on: roots of trees.
        lengths: frames per scene.
        budgets: clusters per scene.
        faithful: clusters are rounded up in every frame, and a tree is its sum over one more than the tokens that joined its
            root directly; else the clusters of a scene are as many as asked for and a tree is its mean.
    """
    frames, tokens, _ = features.shape
    device = features.device
    places = left.flatten().nonzero().flatten()
    slot = torch.full((frames * tokens,), -1, device=device)
    slot[places] = torch.arange(len(places), device=device)
    tree = slot[trees.root]
    values, sizes = merge_scatter(features.flatten(0, 1), tree, None, len(places), out_dtype=torch.float32)
    if faithful:
        values = values * (sizes / (1 + trees.children[places]))[:, None]
    sizes_of_frames: list[int] = left.sum(1).tolist()
    counts = _clusters_of_frames(sizes_of_frames, lengths, budgets, faithful)
    offsets = list(accumulate(sizes_of_frames, initial=0))
    near = [min(count, 7) or min(1, size) for count, size in zip(counts, sizes_of_frames, strict=True)]
    scores = peak_scores(values, offsets, near)
    centres = segmented_topk(scores, offsets, counts)
    ends = list(accumulate(counts, initial=0))
    assigned = nearest_centre(values, offsets, centres, ends)
    merged, _ = merge_scatter(values, assigned, None, len(centres))
    starts = torch.tensor(offsets[:-1], device=device).repeat_interleave(
        torch.tensor(counts, device=device), output_size=len(centres)
    )
    groups = torch.where(tree < 0, tree, assigned[tree.clamp(min=0)]) if len(places) else tree
    return Clusters(places[centres + starts], merged, groups)


def _clusters_of_frames(
    sizes: Sequence[int], lengths: Sequence[int], budgets: Sequence[int], faithful: bool
) -> list[int]:
    """Split the clusters of each scene over its frames, in proportion to their tokens."""
    counts: list[int] = []
    first = 0
    for length, budget in zip(lengths, budgets, strict=True):
        mine = list(sizes[first : first + length])
        first += length
        if budget >= sum(mine):
            counts += mine
        elif faithful:
            ratio = budget / sum(mine)
            counts += [ceil(size * ratio) for size in mine]
        else:
            room = torch.tensor([mine])
            counts += apportion(torch.tensor([budget]), room.double(), room)[0].tolist()
    return counts
