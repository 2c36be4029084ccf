"""SCOPE: tokens that cover the others, the salient ones first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.kernels.coverage import coverage
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_number
from vlmprune.methods.needs import TOWER_ATTENTION, TOWER_FEATURES, Need
from vlmprune.methods.picture_method import PictureMethod
from vlmprune.methods.selection_macs import Scored, pairs_in_tiles_macs
from vlmprune.methods.shared.features import features_signal, tower_features
from vlmprune.methods.shared.tile_segments import even_counts, local_indices, tile_segments, to_device


@dataclass(frozen=True, kw_only=True)
class SCOPE(PictureMethod):
    """Keep tokens greedily, each with the highest gain in coverage times its CLS attention to the power `alpha`.

    A set of tokens covers a token by its highest cosine to the set, or by 0 if that is negative; cosines are of the
    features before the projector, and the gain is the sum over the tokens of the tile. The attention is that of the
    layer whose output becomes the visual tokens, summed over heads; received attention where there is no CLS token.
    Every tile keeps the same number of tokens, as far as it has that many; newlines are dropped first. Kept tokens
    stay in raster order; ties go to the lowest index.

    Videos are served too, every frame as an image with an even share of the budget.

    Source: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs", NeurIPS 2025, arXiv
    2510.24214. Paper and official code agree. The code computes in half precision, where gains of early picks often
    tie; here they are fp32. It divides `keep` by all tiles of the call, here by those of the image; on LLaVA-NeXT it
    also takes padding tokens, which transformers' models do not have.

    Attributes:
        alpha: power of the attention; 0 for pure coverage.
        combined: "multi" multiplies gain and saliency, "add" adds them (COMBINED in the official code).
    """

    alpha: float = 1.0
    combined: Literal["multi", "add"] = "multi"

    name: ClassVar[str] = "scope"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_ATTENTION, TOWER_FEATURES})
    symbols: ClassVar[Mapping[str, str]] = {"mode": "combined"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "[0, inf)")
        check_choice("combined", self.combined, ("multi", "add"))

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention of the feature layer, unless coverage alone counts, and for the features."""
        features = features_signal(tower)
        return (features,) if self.alpha == 0 else (features, tower.attention(tower.feature_layer))

    def select(self, batch: VisualBatch) -> Selection:
        """Pick `budgets[i]` tokens of each image."""
        segments = tile_segments(batch.layouts)
        counts = even_counts(segments, batch.budgets).flatten()
        picks = self.order(batch)
        starts = torch.tensor(segments.offsets[:-1]).repeat_interleave(counts)
        packed = to_device(segments.order, picks.device)[picks + to_device(starts, picks.device)]
        return Selection(local_indices(packed.sort().values, segments, batch.budgets), batch.budgets)

    def order(self, batch: VisualBatch) -> Tensor:
        """Return the picks of every tile in the order in which they are made, int64 `[sum(budgets)]`, counted inside the tile."""
        segments = tile_segments(batch.layouts)
        order = to_device(segments.order, batch.features.device)
        weights = None
        if self.alpha:
            attention = batch.vision[batch.tower.attention(batch.tower.feature_layer)]
            weights = attention.float().sum(-1)[order] ** self.alpha
        counts = even_counts(segments, batch.budgets).flatten()
        combine = "multiply" if self.combined == "multi" else "add"
        return coverage(tower_features(batch)[order], segments.offsets, counts, weights=weights, combine=combine)

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of all pairs of a tile."""
        return pairs_in_tiles_macs(scored)
