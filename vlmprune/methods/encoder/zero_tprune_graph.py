"""Zero-TPrune's stages: PageRank on the attention graph, and of the unimportant those that resemble the important."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.attention_pagerank import attention_pagerank
from vlmprune.kernels.bipartite_match import bipartite_match


class Votes(NamedTuple):
    """What the attention graph says of the tokens of each sequence.

    Attributes:
        importance: fp32 `[batch, tokens]`, root of the mean square over the heads that are used.
        variance: fp32 `[batch, heads]`, of votes scaled to a mean of one.
        used: bool `[batch, heads]`.
    """

    importance: Tensor
    variance: Tensor
    used: Tensor


def weighted_votes(
    query: Tensor,
    key: Tensor,
    iterations: int,
    *,
    scale: float | None = None,
    boost_first: bool = True,
    variance: tuple[float, float] = (0.01, 0.7),
) -> Votes:
    """Return the weighted page rank of every token (WPR), over heads that neither agree on all tokens nor on one.

    Args:
        query: `[batch, tokens, heads, head_dim]`.
        key: `[batch, tokens, heads, head_dim]`.
        iterations: rounds of votes.
        scale: factor of the logits; None for `head_dim ** -0.5`.
        boost_first: whether token 0 (the class token) starts with `sqrt(tokens)` times the votes of the others.
        variance: a head's bounds (VHF); all heads are used where none lies within.
    """
    batch, tokens, heads, _ = query.shape
    offsets = range(0, batch * tokens + 1, tokens)
    start = query.new_ones(batch, tokens, dtype=torch.float32)
    if boost_first:
        start[:, 0] = tokens**0.5
    votes = attention_pagerank(
        query.flatten(0, 1),
        key.flatten(0, 1),
        offsets,
        iterations,
        scale=scale,
        start=start.flatten(),
        reduce_heads="none",
    ).view(batch, tokens, heads)
    spread = (votes * tokens).var(1, correction=0)
    used = (spread >= variance[0]) & (spread <= variance[1])
    used = used | ~used.any(-1, keepdim=True)
    squares = (votes.square() * used[:, None]).sum(-1) / used.sum(-1, keepdim=True)
    return Votes(squares.sqrt(), spread, used)


class Redundant(NamedTuple):
    """The stage that compares the less important half with the more important one; all are positions, int64.

    Attributes:
        group_a: `[batch, half]` the less important ones, by importance.
        group_b: `[batch, rest]` the more important ones.
        partners: `[batch, half]` the most similar of `group_b`.
        cosines: fp32 `[batch, half]`.
        dropped: `[batch, r]` of `group_a`, the most similar first.
    """

    group_a: Tensor
    group_b: Tensor
    partners: Tensor
    cosines: Tensor
    dropped: Tensor


def most_redundant(importance: Tensor, key: Tensor, r: int, class_token: bool) -> Redundant:
    """Return which `r` of the less important half of the tokens are most like one of the other half.

    Args:
        importance: `[batch, tokens]`.
        key: `[batch, tokens, head_dim]`, mean over heads.
        r: how many.
        class_token: whether token 0 is one, which takes no part.
    """
    shift = int(class_token)
    order = importance[:, shift:].sort(dim=-1, descending=True, stable=True).indices + shift
    half = order.shape[1] // 2
    group_b, group_a = order[:, : order.shape[1] - half], order[:, order.shape[1] - half :]
    wide = (-1, -1, key.shape[2])
    sources, destinations = (key.gather(1, some[..., None].expand(wide)).flatten(0, 1) for some in (group_a, group_b))
    batch = len(key)
    best, cosines = bipartite_match(
        sources, destinations, [half * i for i in range(batch + 1)], [group_b.shape[1] * i for i in range(batch + 1)]
    )
    best, cosines = best.view(batch, half), cosines.view(batch, half)
    dropped = group_a.gather(1, cosines.sort(dim=-1, descending=True, stable=True).indices[:, :r])
    return Redundant(group_a, group_b, group_b.gather(1, best) if half else best, cosines, dropped)


def complement(dropped: Tensor, tokens: int) -> Tensor:
    """Return the positions that are not dropped, ascending: int64 `[batch, tokens - dropped]`."""
    stays = torch.ones(len(dropped), tokens, dtype=torch.bool, device=dropped.device).scatter_(1, dropped, False)
    return stays.nonzero()[:, 1].view(len(dropped), tokens - dropped.shape[1])


def top_votes(importance: Tensor, count: int, class_token: bool) -> Tensor:
    """Return the class token and the `count` most important others, ascending: int64 `[batch, (1 +) count]`."""
    shift = int(class_token)
    order = importance[:, shift:].sort(dim=-1, descending=True, stable=True).indices[:, :count] + shift
    return torch.cat([order.new_zeros(len(order), shift), order], 1).sort(-1).values
