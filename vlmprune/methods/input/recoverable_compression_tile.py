"""What Recoverable Compression chooses and merges in one tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.methods.shared.apportion import apportion
from vlmprune.methods.shared.outliers import outlier_share

# Neighbours of the outlier factor for attention, text and centres; tokens merged into a centre; weight of the text there.
NEIGHBOURS = (20, 20, 10)
MERGED, TEXT_WEIGHT = 32, 50.0
# The published similarity is the cosine times this.
SIMILARITY_SCALE = 768**-0.5


class TileChoice(NamedTuple):
    """Indices inside one tile, int64.

    Attributes:
        image: the image of the batch.
        by_attention: kept for their attention, the highest first.
        by_text: kept for their similarity to the text, the highest first.
        merged: `[centres, tokens]`, the factor with which each token goes into each centre, or None without centres.
        remaining: tokens that are not kept, ascending.
        centres: indices in `remaining`, the highest attention first.
        others: indices in `remaining` of the tokens that are no centre; empty where there is no extra token.
    """

    image: int
    by_attention: Tensor
    by_text: Tensor
    merged: Tensor | None
    remaining: Tensor
    centres: Tensor
    others: Tensor

    @property
    def main(self) -> Tensor:
        """Tokens that are kept as they are, ascending."""
        return torch.cat([self.by_attention, self.by_text]).sort().values


def choose_in_tile(
    attention: Tensor, keys: Tensor, similarity: Tensor, width: int, count: int | None, *, code: bool
) -> TileChoice:
    """Return the choice in a tile.

    Args:
        attention: `[tokens]`, of the CLS token.
        keys: `[tokens, dim]`.
        similarity: `[tokens]`, to the text.
        width: of the features, which the official code's number of centres depends on.
        count: tokens that are kept in all, extra one included; None for what the outliers say.
        code: as the official code, where it departs from the paper.
    """
    total, device = len(attention), attention.device
    share = outlier_share(attention, NEIGHBOURS[0])
    first = int(total * share)
    by_attention = attention.argsort(descending=True, stable=True)
    recovered = similarity.index_fill(0, by_attention[:first], float(similarity.min()))
    second = int((total - first) * outlier_share(recovered, NEIGHBOURS[1]))
    kept = torch.zeros(total, dtype=torch.bool, device=device)
    chosen = _chosen(by_attention, similarity, first, second)
    remaining = (~kept.index_fill(0, torch.cat(chosen), True)).nonzero().flatten()
    third = int((width if code else len(remaining)) * outlier_share(attention[remaining], NEIGHBOURS[2]))
    third = min(third, max(0, len(remaining) - 1))
    if count is None and first + second + third == 0:
        first = 1
        chosen = _chosen(by_attention, similarity, first, second)
        remaining = (~kept.index_fill(0, torch.cat(chosen), True)).nonzero().flatten()
    has_extra = third > 0
    if count is not None:
        has_extra = count > 1
        weights = torch.tensor([[float(first), float(second), float(third)]])
        if not weights.any():
            weights[0, 0] = 1.0
        room = torch.full((1, 3), count - has_extra)
        first, second, third = apportion(room[:, 0], weights, room)[0].tolist()
        chosen = _chosen(by_attention, similarity, first, second)
        remaining = (~kept.index_fill(0, torch.cat(chosen), True)).nonzero().flatten()
    centres = attention[remaining].argsort(descending=True, stable=True)[:third]
    is_other = torch.ones(len(remaining), dtype=torch.bool, device=device).index_fill(0, centres, False)
    others = is_other.nonzero().flatten() if has_extra else centres[:0]
    merged = None
    if third:
        # The official code looks keys of the remaining tokens up by their place in that list.
        unit = normalize((keys[: len(remaining)] if code else keys[remaining]).float(), dim=-1)
        scores = unit[centres] @ unit.T + TEXT_WEIGHT * similarity[remaining]
        scores[torch.arange(third, device=device), centres] = -torch.inf
        near = scores.topk(min(MERGED, len(remaining) - 1), dim=1).indices
        merged = torch.zeros(third, total, device=device)
        merged.scatter_(1, remaining[near], attention[remaining[near]].float())
        merged[torch.arange(third, device=device), remaining[centres]] = 1.0
    return TileChoice(0, *chosen, merged, remaining, centres, others)


def _chosen(by_attention: Tensor, similarity: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    kept = by_attention[:first]
    text = similarity.index_fill(0, kept, -torch.inf).argsort(descending=True, stable=True)[:second]
    return kept, text


def merging(choice: TileChoice, attention: Tensor) -> Tensor:
    """Return the factors with which the tile's tokens go into its merged ones, centres first, then the extra: `[merged, tokens]`.

    Args:
        choice: what is chosen.
        attention: `[tokens]`, of the CLS token.
    """
    rows = [attention.new_zeros(0, len(attention)) if choice.merged is None else choice.merged]
    if len(choice.others):
        left = choice.remaining[choice.others]
        rows.append(torch.zeros_like(attention).index_copy_(0, left, attention[left])[None])
    return torch.cat(rows)
