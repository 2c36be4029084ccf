"""The choice of IVC-Prune in one image: tokens that carry position, tokens whose values resemble the question's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.kernels.row_attention import row_attention
from vlmprune.kernels.segmented_topk import segmented_topk

# Rows of similarities held at a time.
_BLOCK = 256


@dataclass(frozen=True)
class IVCCounts:
    """How many tokens of an image each rule takes.

    Attributes:
        seeds: tokens whose values resemble those of the text most; they ask along with it.
        positions: tokens of the largest mean cosine, and as many of the largest mean sine.
        best: tokens by the score of text and seeds.
        total: tokens that stay; None for the union of all of these.
    """

    seeds: int
    positions: int
    best: int
    total: int | None


@dataclass(frozen=True, eq=False)
class IVCChoice:
    """What was chosen in one image of `tokens` visual tokens.

    Attributes:
        text_scores: fp32 `[tokens]`, mean similarity of the text's values.
        seeds: int64 `[seeds]`, falling `text_scores`.
        scores: fp32 `[tokens]`, mean similarity of the values of text and seeds.
        coordinates: bool `[tokens]`, the tokens that carry position.
        best: int64, the highest `scores`, ascending.
        kept: int64, ascending.
    """

    text_scores: Tensor
    seeds: Tensor
    scores: Tensor
    coordinates: Tensor
    best: Tensor
    kept: Tensor


def value_similarity(queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the sum over rows of the softmaxed similarity of values, averaged over heads: fp32 `[keys]`.

    Args:
        queries: `[rows, heads, head_dim]`, values without rotation.
        keys: `[keys, heads, head_dim]`; the softmax is over these.
        mask: bool `[keys]`, False at padding; None if there is none.
    """
    total = torch.zeros(len(keys), device=keys.device)
    for rows in queries.split(_BLOCK):
        seen = None if mask is None else mask[None]
        total += row_attention(rows[None], keys[None], mask=seen, reduce="mean")[0].sum(0)
    return total


def choose(
    values: Tensor,
    image: Tensor,
    text: Tensor,
    cosines: Tensor,
    sines: Tensor,
    counts: IVCCounts,
    *,
    all_keys: bool = False,
    valid: Tensor | None = None,
) -> IVCChoice:
    """Choose the tokens of one image.

    Args:
        values: `[width, heads, head_dim]`, values of the row.
        image: int64 `[tokens]`, columns of its visual tokens.
        text: int64, columns of the text that asks; without any, the scores are 0 up to the seeds.
        cosines: fp32 `[tokens]`, mean rotary cosines.
        sines: fp32 `[tokens]`, mean rotary sines.
        counts: how many each rule takes.
        all_keys: whether the softmax is over the whole row and not over the image.
        valid: bool `[width]`, False at padding; None if there is none.
    """
    tokens = len(image)

    def similarity(columns: Tensor) -> Tensor:
        if all_keys:
            return value_similarity(values[columns], values, valid)[image]
        return value_similarity(values[columns], values[image])

    def top(scores: Tensor, count: int, order: str = "position") -> Tensor:
        return segmented_topk(scores, (0, tokens), (min(count, tokens),), order=order)

    from_text = similarity(text)
    seeds = top(from_text, counts.seeds, "score")
    scores = (from_text + similarity(image[seeds])) / (len(text) + len(seeds))
    carries = torch.zeros(tokens, dtype=torch.bool, device=values.device)
    for means in (cosines, sines):
        carries[top(means, counts.positions)] = True
    best = top(scores, counts.best)
    first = carries.index_fill(0, seeds, True)
    if counts.total is None:
        kept = first.index_fill(0, best, True).nonzero().flatten()
    else:
        # Similarities lie in [0, 1], so that a whole 2 puts the tokens in front that stay in any case.
        kept = top(scores + 2.0 * first, counts.total)
    return IVCChoice(from_text / max(1, len(text)), seeds, scores, carries, best, kept)
