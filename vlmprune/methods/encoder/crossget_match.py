"""CrossGET's match on the complete graph, and its weighted ensemble."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class CompleteGraphMatch(NamedTuple):
    """Which tokens merge into which, all int64.

    Attributes:
        sources: `[batch, r]` positions that are merged away, lowest priority first.
        rest: `[batch, tokens - r]` the other positions, by priority.
        partners: `[batch, r]` the row of `rest` that each source goes to.
        kept: `[batch, tokens - r]` the positions of `rest` in their order.
    """

    sources: Tensor
    rest: Tensor
    partners: Tensor
    kept: Tensor


def attention_importance(attention: Tensor) -> Tensor:
    """Return the importance of the variant for LLaVA, fp32 `[batch, tokens]`.

    It is the mean attention that a token gets from all tokens but the cross token, plus what the cross token gives it.

    Args:
        attention: `[batch, tokens, tokens]`, mean over heads, cross token last.
    """
    attention = attention.float()
    return attention[:, :-1].mean(1) + attention[:, -1]


def query_importance(key: Tensor, query: Tensor) -> Tensor:
    """Return the importance of the variant for CLIP: each key's cosine to the cross token's query, fp32 `[batch, tokens]`.

    Args:
        key: `[batch, tokens, head_dim]`, mean over heads.
        query: `[batch, tokens, head_dim]` likewise, cross token last.
    """
    return (normalize(key.float(), dim=-1) @ normalize(query.float()[:, -1], dim=-1)[..., None])[..., 0]


def complete_graph_match(
    key: Tensor, importance: Tensor | None, r: int, protected: tuple[int, ...] = (0, -1)
) -> CompleteGraphMatch:
    """Match the tokens of every sequence, of which some never merge.

    Tokens are ranked by their highest cosine, and each may only go by the ranks below its own when its priority is
    found; then it goes to the most similar of all that stay. Two nearest neighbours of each other always tie in that
    rank. Which of them merges is left to `torch.argsort`, unstable, as the official code leaves it: its answers are
    those of the CPU there.

    Args:
        key: `[batch, tokens, head_dim]`, mean over heads.
        importance: `[batch, tokens]`; None for none, the paper's matching alone.
        r: how many tokens are merged away, at most half of those that may be.
        protected: the tokens that never merge and that nothing merges into.
    """
    rows = normalize(key.float(), dim=-1)
    cosines = rows @ rows.transpose(1, 2)
    for fixed in protected:
        cosines[:, fixed] = -torch.inf
        cosines[:, :, fixed] = -torch.inf
    cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    order = cosines.amax(-1).argsort(dim=-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    best = cosines.masked_fill(rank[:, None] <= rank[..., None], -torch.inf).amax(-1)
    priority = (-best if importance is None else importance - best).argsort(dim=-1)
    sources, rest = priority[:, :r], priority[:, r:]
    between = cosines.gather(1, sources[..., None].expand(-1, -1, cosines.shape[2]))
    partners = between.gather(2, rest[:, None].expand(-1, r, -1)).argmax(-1)
    return CompleteGraphMatch(sources, rest, partners, rest.sort(-1).values)


def ensemble_weights(match: CompleteGraphMatch, importance: Tensor | None) -> Tensor:
    """Return the softmax over the importance of each source and its destination, fp32 `[batch, r, 2]`."""
    if importance is None:
        return match.sources.new_full((*match.sources.shape, 2), 0.5, dtype=torch.float32)
    destinations = match.rest.gather(1, match.partners)
    return (
        torch.stack([importance.gather(1, match.sources), importance.gather(1, destinations)], -1).float().softmax(-1)
    )


def ensemble(tokens: Tensor, sizes: Tensor | None, match: CompleteGraphMatch, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the sources into their destinations, the official code's way, and return what stays in the order of positions.

    A destination y with sources s becomes `y + sum(2 w_s s + (2 w_y - 1) y)`, of tokens times their sizes, divided by
    the sum of the sizes: a mean by size where all weights are 1/2, and otherwise no convex combination.

    Args:
        tokens: `[batch, tokens, dim]`.
        sizes: fp32 `[batch, tokens]`; None for 1 each.
        match: which go where.
        weights: `[batch, r, 2]` of source and destination.

    Returns:
        The tokens `[batch, tokens - r, dim]`, dtype of `tokens`, and their sizes, fp32 `[batch, tokens - r]`.
    """
    sizes = tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if sizes is None else sizes.float()
    heavy = tokens.float() * sizes[..., None]
    destinations = match.rest.gather(1, match.partners)
    wide = (-1, -1, tokens.shape[2])
    at_sources, at_destinations = (
        heavy.gather(1, some[..., None].expand(wide)) for some in (match.sources, destinations)
    )
    added = 2 * weights[..., :1] * at_sources + (2 * weights[..., 1:] - 1) * at_destinations
    heavy = heavy.scatter_add(1, destinations[..., None].expand(wide), added)
    sizes = sizes.scatter_add(1, destinations, sizes.gather(1, match.sources)).gather(1, match.kept)
    kept = heavy.gather(1, match.kept[..., None].expand(wide)) / sizes[..., None]
    return kept.to(tokens.dtype), sizes
