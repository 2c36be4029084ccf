"""The inner step of HoliTom: one cut as FastV's, whose dropped tokens go into those that they are most like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.bipartite_match import bipartite_match
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.methods.batch import Selection
from vlmprune.methods.layer_method import LayerBatch
from vlmprune.methods.selection_macs import ScoredLayers

from .fastv import FastV, fastv_keep


@dataclass(frozen=True, kw_only=True)
class HoliTomMerge(FastV):
    """Keep the tokens that the last prompt token attends to in layer K-1, and fold the others into them.

    What stays and its positions are as of `FastV`. Every dropped token, in position order, goes into the kept one whose hidden
    state has the highest cosine to its own: each time the kept one becomes the mean of itself and the dropped one, so of
    several the last weighs one half, as in the official code.

    Source: the inner step of "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, arXiv
    2505.21334; see `HoliTom`.
    """

    name: ClassVar[str] = "holitom_merge"
    merges: ClassVar[bool] = True
    is_stage: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {"HOLITOM_k": "layer=HOLITOM_k", "HOLITOM_r": "ratio=HOLITOM_r"}

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Take the `budgets[i]` highest scores of each image, and fold its other tokens into these."""
        assert batch.attention is not None
        assert batch.hidden is not None
        budgets = tuple(budget or 0 for budget in batch.budgets)
        kept = fastv_keep(batch.attention, batch.offsets, budgets)
        hidden = torch.cat([batch.hidden[row, columns] for row, columns in zip(batch.rows, batch.columns, strict=True)])
        fold = plan_fold(hidden, kept, batch.counts, budgets)
        starts = torch.tensor(list(accumulate(budgets, initial=0))[:-1], device=kept.device)
        counts = torch.tensor(batch.counts, device=kept.device)
        groups = fold.rows - starts.repeat_interleave(counts, output_size=len(fold.rows))
        return Selection(kept, budgets, features=fold.merge(hidden), merge=fold.merge, groups=groups)

    def own_macs(self, scored: ScoredLayers) -> int:
        """The cosines of the dropped tokens with the kept ones."""
        before, after = scored.visual[self.layer - 1], scored.visual[self.layer]
        return (before - after) * after * scored.dim


class Fold(NamedTuple):
    """How tokens go into kept ones.

    Attributes:
        rows: int64 `[tokens]`, the kept token that each one goes into, itself for a kept one.
        weights: fp32 `[tokens]`, its part in the value; those of a kept token sum to 1.
        kept: number of kept tokens.
    """

    rows: Tensor
    weights: Tensor
    kept: int

    def merge(self, values: Tensor) -> Tensor:
        """Fold `values [tokens, dim]`; `[kept, dim]` in their dtype."""
        device = values.device
        return merge_scatter(values, self.rows.to(device), self.weights.to(device), self.kept)[0]


def plan_fold(hidden: Tensor, kept: Tensor, counts: Sequence[int], budgets: Sequence[int]) -> Fold:
    """Return which kept token each token goes into, and with what weight.

    Args:
        hidden: `[tokens, dim]`, image after image.
        kept: int64 `[sum(budgets)]`, local to the image, ascending.
        counts: tokens per image.
        budgets: kept tokens per image.
    """
    device, tokens = hidden.device, len(hidden)
    starts = torch.tensor(list(accumulate(counts, initial=0))[:-1], device=device)
    kept = kept + starts.repeat_interleave(torch.tensor(budgets, device=device), output_size=len(kept))
    # The dropped ones in their order, without waiting to learn where they are.
    held = torch.zeros(tokens, dtype=torch.int8, device=device).index_fill_(0, kept, 1)
    dropped = held.argsort(stable=True)[: tokens - len(kept)]
    left = [count - budget for count, budget in zip(counts, budgets, strict=True)]
    partner, _ = bipartite_match(
        hidden[dropped], hidden[kept], list(accumulate(left, initial=0)), list(accumulate(budgets, initial=0))
    )
    first = torch.tensor(list(accumulate(budgets, initial=0))[:-1], device=device)
    partner = partner + first.repeat_interleave(torch.tensor(left, device=device), output_size=len(dropped))
    sizes = torch.zeros(len(kept), dtype=torch.int64, device=device).scatter_add_(0, partner, torch.ones_like(partner))
    order = partner.argsort(stable=True)
    rank = torch.arange(len(dropped), device=device) - (sizes.cumsum(0) - sizes)[partner[order]]
    # Of `m` tokens that go into one the last has weight 1/2, the one before 1/4, the kept one as much as the first.
    halvings = torch.zeros(tokens, device=device)
    halvings[dropped[order]] = (sizes[partner[order]] - rank).float()
    halvings[kept] = sizes.float()
    rows = torch.zeros(tokens, dtype=torch.int64, device=device)
    rows[dropped] = partner
    rows[kept] = torch.arange(len(kept), device=device)
    return Fold(rows, torch.exp2(-halvings), len(kept))
