"""The stages of VisionDrop inside the language model: visual tokens that the others look at, and contextual ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.budget import Keep
from vlmprune.errors import ParameterError
from vlmprune.kernels.bipartite_match import bipartite_match
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_int
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers
from vlmprune.methods.needs import STILL_IMAGES, VISUAL_AT_CUT, Need
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.staged_method import scaled_cuts, solve_shares, unreachable

# Tokens behind layers 8, 16 and 24 of 32 in the published script, whose tower sends 48.
_STAGES = (35, 26, 19)
_CUTS, _DEPTH = (8, 16, 24), 32
# What enters is half as much again as the average over layers, if there is as much.
ENTRY = 1.5
# One of seven tokens is contextual (5 of 35, 4 of 26, 3 of 19).
_PART = 7


@dataclass(frozen=True, kw_only=True)
class VisionDropStages(LayerMethod):
    """Keep the visual tokens that the image's own tokens look at, and merge the others into a few, in stages.

    At the input of each layer in `layers` a token's score is the attention that it receives from all visual tokens of its image
    in that layer: causal softmax over the whole sequence, mean over heads and queries. The best are dominant and stay, in their
    order. Of the others every `step`-th is a target, `step` their number over the number of contextual tokens, rounded down; each
    other joins the target whose keys (rotary positions applied, mean over heads) have the highest cosine to its own. A contextual
    token is the target plus the mean of those that joined it; these come behind the dominant ones.

    Positions: as before the first layer. 1-D positions close the gaps after every stage, as in the official code; with M-RoPE
    tokens keep their ids, contextual ones their target's.

    Attributes:
        keep: as of `VisionDrop`: what enters is 1.5 times the average, the stages follow 35, 26, 19 of 48.
        layers: 0-based layers at whose input tokens are dropped; by default a quarter, a half and three quarters of the layers.
        counts: per stage dominant and contextual tokens of an image, instead of `keep`.

    Source: "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", AAAI 2026, arXiv
    2506.22283; see `VisionDrop`.
    """

    layers: tuple[int, ...] | None = None
    counts: tuple[tuple[int, int], ...] | None = None

    name: ClassVar[str] = "visiondrop_stages"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, VISUAL_AT_CUT})
    merges: ClassVar[bool] = True
    is_stage: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {"layer_list": "layers="}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        if self.counts is None:
            if self.keep is None:
                object.__setattr__(self, "keep", 0.25)
            if self.layers is not None and len(self.layers) != len(_STAGES):
                raise ParameterError(
                    f"layers={self.layers} has {len(self.layers)} stages; allowed: {len(_STAGES)}, or counts= too."
                )
            return
        if self.keep is not None or self.layers is None or len(self.layers) != len(self.counts):
            raise ParameterError(
                f"counts={self.counts!r} with keep={self.keep!r} and layers={self.layers!r}; allowed: counts of every one of the "
                "layers, and no keep."
            )
        for stage, (dominant, contextual) in enumerate(self.counts):
            check_int(f"counts[{stage}][0]", dominant, 1)
            check_int(f"counts[{stage}][1]", contextual, 0)

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers of all stages."""
        check_depth("layers", self.layers or (), layers)
        return self.layers or scaled_cuts(_CUTS, _DEPTH, layers)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the stages of an image of which `total` tokens entered."""
        cuts = self.cut_layers(layers)
        if self.counts is not None:
            return tuple(LayerCut(cut, sum(count)) for cut, count in zip(cuts, self.counts, strict=True))
        assert self.keep is not None
        share = share_of_entered(self.keep, total)
        if share >= 1:
            return ()
        parts = _STAGES[: len(cuts)]
        first = solve_shares(share, layers, cuts, partial(_shares, parts))
        if first is None:
            raise unreachable(share, layers, cuts[0])
        return tuple(
            LayerCut(cut, max(1, round(total * part))) for cut, part in zip(cuts, _shares(parts, first), strict=True)
        )

    def contextual(self, batch: LayerBatch) -> tuple[int, ...]:
        """Return how many of each image's tokens after the cut are contextual."""
        if self.counts is not None:
            stage = self.cut_layers(batch.layers).index(batch.layer)
            return (self.counts[stage][1],) * len(batch.counts)
        return tuple(min(max(1, round((budget or 0) / _PART)), (budget or 0) - 1) for budget in batch.budgets)

    def scores(self, batch: LayerBatch) -> tuple[Tensor, ...]:
        """Return the attention that each token receives from its image's, fp32 `[counts[i]]` per image."""
        return batch.attention_of(batch.columns, reduce_queries="mean")

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Keep and merge the tokens of every image."""
        assert batch.probed is not None
        assert batch.hidden is not None
        past = batch.probed.key.shape[1] - batch.hidden.shape[1]
        budgets = tuple(budget or 0 for budget in batch.budgets)
        chosen = [
            dominant_and_contextual(
                scores, batch.probed.key[row, columns + past].float().mean(1), budget - contextual, contextual
            )
            for scores, row, columns, budget, contextual in zip(
                self.scores(batch), batch.rows, batch.columns, budgets, self.contextual(batch), strict=True
            )
        ]
        kept, groups = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        hidden = torch.cat([batch.hidden[row, columns] for row, columns in zip(batch.rows, batch.columns, strict=True)])
        merge = partial(target_plus_mean, kept=kept, groups=groups, tokens=batch.counts, counts=budgets)
        return Selection(kept, budgets, features=merge(hidden), merge=merge, groups=groups)

    def own_macs(self, scored: ScoredLayers) -> int:
        """The cosines of keys with those of the targets."""
        total = 0
        for cut in self.cut_layers(len(scored.visual)):
            before, after = scored.visual[cut - 1], scored.visual[cut]
            if after < before:
                contextual = max(1, round(after / _PART))
                total += (before - after + contextual) * contextual * scored.head_dim
        return total


def share_of_entered(keep: Keep, entered: int) -> float:
    """Return the average over layers as a share of the tokens that entered, 1.5 times as many or all there are."""
    if isinstance(keep, int):
        return keep / entered
    return max(keep, 1 / ENTRY)


def _shares(parts: Sequence[int], first: float) -> tuple[float, ...]:
    return tuple(min(1.0, first * part / parts[-1]) for part in parts)


def dominant_and_contextual(scores: Tensor, metric: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Return what stays of one image: dominant tokens in their order, then targets.

    Args:
        scores: fp32 `[tokens]`.
        metric: fp32 `[tokens, dim]`, what is compared.
        dominant: tokens with the highest score that stay.
        contextual: targets among the others, fewer than these.

    Returns:
        Int64 `[dominant + contextual]`, and int64 `[tokens]`, the place among these that each token goes to, -1 for none.
    """
    kept = segmented_topk(scores, (0, len(scores)), (dominant,))
    groups = torch.full_like(scores, -1, dtype=torch.int64)
    groups[kept] = torch.arange(dominant, device=kept.device)
    if not contextual:
        return kept, groups
    # The places of the others in their order, without waiting to learn how many there are.
    left = len(scores) - dominant
    others = groups.ge(0).to(torch.int8).argsort(stable=True)[:left]
    targets = others[torch.arange(contextual, device=kept.device) * max(1, left // contextual)]
    joined, _ = bipartite_match(metric[others], metric[targets], (0, left), (0, contextual))
    groups[others] = dominant + joined
    groups[targets] = dominant + torch.arange(contextual, device=kept.device)
    return torch.cat([kept, targets]), groups


def target_plus_mean(
    values: Tensor, kept: Tensor, groups: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Return each kept token plus the mean of those that joined it, `[sum(counts), dim]`, fp32.

    Args:
        values: `[sum(tokens), dim]`, image after image.
        kept: int64 `[sum(counts)]`, places within the image.
        groups: int64 `[sum(tokens)]`, which of the image's kept tokens each goes to, -1 for none.
        tokens: tokens per image.
        counts: kept tokens per image.
    """
    rows = torch.cat([part + start for part, start in zip(kept.split(list(counts)), _starts(tokens), strict=True)])
    into = torch.cat(
        [
            torch.where(part >= 0, part + start, -1)
            for part, start in zip(groups.split(list(tokens)), _starts(counts), strict=True)
        ]
    ).index_fill(0, rows, -1)
    means, _ = merge_scatter(values.float(), into, None, len(kept))
    return values[rows].float() + means


def _starts(counts: Sequence[int]) -> list[int]:
    return list(accumulate(counts, initial=0))[:-1]
