"""MCTF's match by several criteria in both directions, its pooling, and attention that is merged with the tokens."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.methods.shared.merged_tokens import merge_tokens

Pooling = Literal["size", "attention", "max", "mean"]
POOLINGS: tuple[Pooling, ...] = ("size", "attention", "max", "mean")


class TwoWayMatch(NamedTuple):
    """Which tokens merge into which, all int64; "even" and "odd" are places among the even and the odd positions.

    Attributes:
        sources: `[batch, r1]` even ones that merge into odd ones, best first.
        partners: `[batch, r1]` the odd one of each.
        unmerged: `[batch, even - r1]` even ones that stay.
        odd_sources: `[batch, r2]` odd ones that merge into even ones that stay, best first.
        odd_partners: `[batch, r2]` the row of `unmerged` of each.
        odd_unmerged: `[batch, odd - r2]` odd ones that stay, by their score.
        groups: `[batch, tokens]` the output row of every token; even ones that stay come first.
        places: `[batch, outputs]` the position that each output row is the place of.
    """

    sources: Tensor
    partners: Tensor
    unmerged: Tensor
    odd_sources: Tensor
    odd_partners: Tensor
    odd_unmerged: Tensor
    groups: Tensor
    places: Tensor


def fused(tokens: int, r: float, protected: int, least: int = 10) -> int:
    """Return how many tokens one fusion takes away, capped at half of the tokens and so that `least` stay.

    Args:
        tokens: with protected ones.
        r: a count, or a share of the tokens that are not protected.
        protected: number of protected tokens.
        least: what stays at the least.
    """
    if tokens - r < least:
        r = tokens - least
    count = int((tokens - protected) * r) if 0 < r < 1 else int(r)
    return max(0, min(count, (tokens - protected) // 2))


def criteria(
    metric: Tensor,
    received: Tensor | None,
    sizes: Tensor | None,
    *,
    tau_sim: float = 1.0,
    tau_info: float = 20.0,
    tau_size: float = 40.0,
) -> Tensor:
    """Return how much the even tokens are to be merged with the odd ones, fp32 `[batch, even, odd]`.

    The product of similarity, little information (little attention received) and small sizes, each to the power of
    `1 / tau`; a criterion whose tau is 0 is left out.

    Args:
        metric: `[batch, tokens, dim]`.
        received: `[batch, tokens]` attention received; None leaves its criterion out.
        sizes: `[batch, tokens]`; None leaves its criterion out.
        tau_sim: root of the similarity.
        tau_info: root of the information.
        tau_size: root of the sizes.
    """
    rows = normalize(metric.float(), dim=-1)
    even, odd = rows[:, ::2], rows[:, 1::2]
    scores = even.new_ones(len(rows), even.shape[1], odd.shape[1])
    if tau_sim:
        scores = ((even @ odd.transpose(1, 2) + 1) / 2).clamp_(min=0).pow(1 / tau_sim)
    for values, tau in ((received, tau_info), (sizes, tau_size)):
        if values is not None and tau:
            little = values.float().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
            little = (little / little.amax(-1, keepdim=True)).pow(1 / tau)
            scores = scores * little[:, ::2, None] * little[:, None, 1::2]
    return scores


def two_way_match(scores: Tensor, r: int, protected: int, bidirectional: bool = True) -> TwoWayMatch:
    """Match even tokens to odd ones, then the odd ones to the even ones that stay; equal scores go to the lowest index.

    Args:
        scores: `[batch, even, odd]`.
        r: how many tokens are merged away, half of them in either direction.
        protected: number of first tokens that never merge: those of even position do not go, and nothing comes to them.
        bidirectional: whether there is a second direction.
    """
    first = r // 2 if bidirectional else r
    second = r - first
    scores = scores.clone()
    scores[:, :protected] = -torch.inf
    batch, even, odd = scores.shape
    best, partner = scores.max(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    sources, unmerged = order[:, :first], order[:, first:].sort(-1).values
    partners = partner.gather(1, sources)
    back = scores.gather(1, unmerged[..., None].expand(-1, -1, odd)).transpose(1, 2)
    best, partner = back.max(-1)
    order = best.sort(dim=-1, descending=True, stable=True).indices
    odd_sources, odd_unmerged = order[:, :second], order[:, second:]
    odd_partners = partner.gather(1, odd_sources)
    own = torch.arange(even + odd, device=scores.device)
    odd_rows = torch.empty(batch, odd, dtype=torch.int64, device=scores.device)
    odd_rows.scatter_(1, odd_unmerged, (own[: odd - second] + even - first).expand(batch, -1))
    odd_rows.scatter_(1, odd_sources, odd_partners)
    even_rows = torch.empty(batch, even, dtype=torch.int64, device=scores.device)
    even_rows.scatter_(1, unmerged, own[: even - first].expand(batch, -1))
    even_rows.scatter_(1, sources, odd_rows.gather(1, partners))
    groups = torch.empty(batch, even + odd, dtype=torch.int64, device=scores.device)
    groups[:, ::2], groups[:, 1::2] = even_rows, odd_rows
    places = torch.cat([2 * unmerged, 2 * odd_unmerged + 1], 1)
    return TwoWayMatch(sources, partners, unmerged, odd_sources, odd_partners, odd_unmerged, groups, places)


def pooling_weights(received: Tensor, sizes: Tensor | None, pooling: Pooling) -> Tensor:
    """Return the weight of every token in its group, fp32 `[batch, tokens]`.

    Args:
        received: fp32 `[batch, tokens]` attention received.
        sizes: `[batch, tokens]`; None for 1 each.
        pooling: "attention" for attention times size, "size", or anything else for 1 each.
    """
    size = torch.ones_like(received) if sizes is None else sizes.float()
    if pooling == "attention":
        return received * size / size.amax(-1, keepdim=True)
    return size if pooling == "size" else torch.ones_like(received)


def pool(tokens: Tensor, weights: Tensor, groups: Tensor, outputs: int, pooling: Pooling = "attention") -> Tensor:
    """Return what every group becomes, `[batch, outputs, dim]`: its weighted mean, added up in fp32, or its maximum.

    Args:
        tokens: `[batch, tokens, dim]`.
        weights: fp32 `[batch, tokens]`.
        groups: int64 `[batch, tokens]`.
        outputs: number of groups.
        pooling: "max" for the largest value of every feature, anything else for the mean.
    """
    if pooling == "max":
        lowest = tokens.new_full((len(groups), outputs, tokens.shape[2]), -torch.inf)
        return lowest.scatter_reduce(1, groups[..., None].expand_as(tokens), tokens, reduce="amax")
    return merge_tokens(tokens, groups, weights, outputs)[0]


def pool_attention(attention: Tensor, weights: Tensor, groups: Tensor, outputs: int) -> Tensor:
    """Return attention between groups, `[batch, heads, outputs, outputs]`: rows averaged, columns added up.

    Args:
        attention: `[batch, heads, tokens, tokens]`, rows that sum to one; so do those that are returned.
        weights: `[batch, tokens]` of the rows.
        groups: int64 `[batch, tokens]`.
        outputs: number of groups.
    """
    member = torch.nn.functional.one_hot(groups, outputs).to(attention.dtype)
    heavy = (member * weights[..., None]).transpose(1, 2)
    rows = heavy / heavy.sum(-1, keepdim=True)
    return rows[:, None] @ attention @ member[:, None]
