"""TokenCorrCompressor, an experiment: as many tokens as a crop has information, sampled, and the outliers of attention."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.errors import ParameterError
from vlmprune.methods.adaptive_method import AdaptiveMethod
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_flag, check_int, check_number
from vlmprune.methods.needs import STILL_IMAGES, TOWER_ATTENTION, Need
from vlmprune.methods.selection_macs import Scored, pairs_in_tiles_macs
from vlmprune.methods.shared.tile_segments import (
    even_counts,
    local_indices,
    tile_segments,
    to_device,
    top_of_segments,
)


@dataclass(frozen=True, kw_only=True)
class TokenCorr(AdaptiveMethod):
    """Experimental: keep a sample of each crop as large as its information, and the outliers of a deep layer's CLS attention.

    A token is redundant if at least `min_count` others of its crop have keys, in the low layer, of a cosine to its
    own of `sim_threshold` or more. As many tokens as are not redundant (one at least) are drawn without replacement by the low
    layer's CLS attention; tokens whose CLS attention in the deep layer lies more than `iqr_factor` interquartile
    ranges above the third quartile are kept too. The thumbnail of a tiled image stays whole. Newlines are dropped;
    kept tokens stay in position order. Without CLS token the attention that tokens receive stands in.

    `keep=None` (the default) keeps what this finds. A given `keep` is met exactly: every tile, the thumbnail
    included, keeps the same number, the outliers first, by their attention, then the sample in the order in which it
    is drawn; newlines are dropped first.

    Source: "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding", arXiv
    2407.14439. There is no official code, and what is known comes from abstract and figure alone: layers, thresholds
    and the union of the two sets are guesses, published figures are those of a trained host (mPLUG-DocOwl). Do not
    take its results for the paper's.

    Attributes:
        low_layer: 0-based tower layer of keys and sampling; a quarter of the layers if not given.
        deep_layer: 0-based tower layer of the outliers; the feature layer if not given.
        sim_threshold: cosine from which two keys count as alike.
        min_count: number of others alike that makes a token redundant.
        iqr_factor: interquartile ranges above the third quartile where outliers begin.
        sample: draw at random; else the highest attention.
        seed: seed of the draw, which depends on it and on the number of tokens alone.
    """

    low_layer: int | None = None
    deep_layer: int | None = None
    sim_threshold: float = 0.8
    min_count: int = 8
    iqr_factor: float = 1.5
    sample: bool = True
    seed: int = 0

    name: ClassVar[str] = "tokencorr"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_ATTENTION})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low_layer", "deep_layer"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=0)
        check_number("sim_threshold", self.sim_threshold, "[-1, 1]")
        check_int("min_count", self.min_count, low=1)
        check_number("iqr_factor", self.iqr_factor, "[0, inf)")
        check_flag("sample", self.sample)
        check_int("seed", self.seed, low=0)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for keys and attention of the low layer, and for attention of the deep one.

        Raises:
            ParameterError: the tower has no such layer.
        """
        low = tower.layers // 4 if self.low_layer is None else self.low_layer
        deep = tower.feature_layer if self.deep_layer is None else self.deep_layer
        for name, layer in (("low_layer", low), ("deep_layer", deep)):
            if layer >= tower.layers:
                raise ParameterError(
                    f"{name}={layer}, but the vision tower has {tower.layers} layers; allowed: 0 to {tower.layers - 1}; "
                    f"nearest: {tower.layers - 1}."
                )
        return (VisionSignal("keys", low), tower.attention(low), tower.attention(deep))

    def select(self, batch: VisualBatch) -> Selection:
        """Keep what the images ask for, or `budgets[i]` tokens of each."""
        segments = tile_segments(batch.layouts)
        device, width = batch.features.device, segments.sizes.shape[1]
        order = to_device(segments.order, device)
        keys, low, deep = (batch.vision[signal].float()[order] for signal in self.vision_signals(batch.tower))
        low, deep = low.mean(-1), deep.mean(-1)
        noise = to_device(torch.cat([self.noise(count) for count in batch.counts]), device)[order]
        kept, ranks = [], torch.zeros_like(low)
        totals = [0] * len(batch.counts)
        for segment, (begin, end) in enumerate(pairwise(segments.offsets)):
            image, tile = divmod(segment, width)
            if begin == end or tile == width - 1:
                continue
            chosen = self.crop(keys[begin:end], low[begin:end], deep[begin:end], noise[begin:end])
            ranks[begin:end] = -chosen.rank.float()
            whole = tile == 0 and batch.layouts[image].crops is not None
            local = torch.arange(end - begin, device=device) if whole else chosen.kept
            totals[image] += len(local)
            kept.append(order[begin + local])
        if self.keep is not None:
            scores = torch.zeros_like(ranks).index_copy_(0, order, ranks)
            return top_of_segments(scores, segments, even_counts(segments, batch.budgets), batch.budgets)
        return Selection(local_indices(torch.cat(kept).sort().values, segments, tuple(totals)), tuple(totals))

    def noise(self, count: int) -> Tensor:
        """Return `count` draws of the exponential distribution, or ones without sampling; fp32."""
        if not self.sample:
            return torch.ones(count)
        return torch.empty(count).exponential_(generator=torch.Generator().manual_seed(self.seed))

    def crop(self, keys: Tensor, low: Tensor, deep: Tensor, noise: Tensor) -> Crop:
        """Return what is chosen of one crop.

        Args:
            keys: `[tokens, dim]`, keys of the low layer.
            low: `[tokens]`, attention of the low layer.
            deep: `[tokens]`, attention of the deep layer.
            noise: `[tokens]`, exponential draws, or ones.
        """
        unit = normalize(keys.float(), dim=-1)
        alike = (unit @ unit.T).fill_diagonal_(-torch.inf) >= self.sim_threshold
        redundant = alike.sum(1) >= self.min_count
        drawn = (low / noise).argsort(descending=True, stable=True)
        local = drawn[: max(1, int((~redundant).sum()))]
        quartiles = torch.quantile(deep, torch.tensor([0.25, 0.75], device=deep.device, dtype=deep.dtype))
        outlier = deep > quartiles[1] + self.iqr_factor * (quartiles[1] - quartiles[0])
        chosen = outlier.index_fill(0, local, True)
        by_attention = deep.argsort(descending=True, stable=True)
        sequence = torch.cat([by_attention[outlier[by_attention]], drawn[~outlier[drawn]]])
        return Crop(redundant, local, outlier, chosen.nonzero().flatten(), sequence.argsort())

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of all pairs of a tile's keys."""
        return pairs_in_tiles_macs(scored)


class Crop(NamedTuple):
    """What is chosen of a crop.

    Attributes:
        redundant: bool `[tokens]`.
        local: int64, the sample in the order in which it is drawn.
        outlier: bool `[tokens]`, singled out by the deep layer.
        kept: int64, the union of both, ascending.
        rank: int64 `[tokens]`, the place of each token where a number is given: outliers, then the others as drawn.
    """

    redundant: Tensor
    local: Tensor
    outlier: Tensor
    kept: Tensor
    rank: Tensor
