"""The inner stage of MustDrop: a filter by two thresholds on the attention of the text, with protected tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal
from vlmprune.methods.checks import check_flag, check_number
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers
from vlmprune.methods.needs import STILL_IMAGES, TEXT_BEFORE_CUT, TOWER_ATTENTION, Need
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.staged_method import scaled_cuts, solve_shares, unreachable

# The published layers after which tokens are filtered, and the depth of their model.
_LAYERS, _DEPTH = (2, 6, 10, 14), 32


class FilterScores(NamedTuple):
    """What the text's attention says of the visual tokens of one image, fp32 `[tokens]` each.

    Attributes:
        everything: sum over the words.
        highest: the highest of a single word.
    """

    everything: Tensor
    highest: Tensor


@dataclass(frozen=True, kw_only=True)
class MustDropFilter(LayerMethod):
    """Drop tokens that little of the text's attention falls on, in all and from every single word; some are protected.

    After each of `layers` a visual token stays if it gets at least `global_threshold` of what all words behind its image pay
    to visual tokens (mean over heads, summed over words), or at least `individual_threshold` from one of them, or if it is
    among the `ceil(key_rate * N)` tokens that the CLS token of the last vision layer attends to most. When the prefill ends,
    the caches of these layers and of all that follow hold only the last set.

    With `keep`, the average over layers as a share of the visual tokens before the vision tower merged any or as a number,
    the thresholds are scaled so that the wanted number stays: tokens are ranked by the larger of both tests, protected
    ones first. Each filter keeps the same share of what it gets.

    The defaults are the paper's for 192 of 576 tokens.

    Positions: original; `positions="compact"` closes gaps after each filter, as in the official code.

    Attributes:
        layers: 0-based layers after which tokens are filtered; (2, 6, 10, 14) of 32, scaled with the depth, if not given.
        key_rate: share of the tokens that are protected.
        global_threshold: of a token's share of all attention.
        individual_threshold: of the highest attention of a word.
        faithful: later tokens count their positions from what each layer's cache holds.

    Source: stages 1b to 3 of "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", arXiv
    2411.10803.
    """

    layers: tuple[int, ...] | None = None
    key_rate: float = 0.08
    global_threshold: float = 0.001
    individual_threshold: float = 0.001
    faithful: bool = False

    name: ClassVar[str] = "mustdrop_filter"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_ATTENTION, TEXT_BEFORE_CUT})
    symbols: ClassVar[Mapping[str, str]] = {}
    is_stage: ClassVar[bool] = True
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        check_number("key_rate", self.key_rate, "[0, 1]", "the share of the tokens that are protected")
        check_number("global_threshold", self.global_threshold, "(0, inf)")
        check_number("individual_threshold", self.individual_threshold, "(0, inf)")
        check_flag("faithful", self.faithful)

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers behind the filters."""
        if self.layers is not None:
            check_depth("layers", [layer + 1 for layer in self.layers], layers)
            return tuple(layer + 1 for layer in self.layers)
        check_depth("layers", (), layers)
        cuts = scaled_cuts([layer + 1 for layer in _LAYERS], _DEPTH, layers)
        if isinstance(self.keep, float) and self.keep * layers <= cuts[0] * self.keep**0.5:
            raise unreachable(self.keep, layers, cuts[0])
        return cuts

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the cuts; the attention and what the tower merged tell how many stay."""
        return tuple(LayerCut(cut, None) for cut in self.cut_layers(layers))

    def trims_cache(self, layers: int) -> int:
        """Return the first layer that is filtered behind."""
        return self.cut_layers(layers)[0] - 1

    @property
    def counts_by_cache(self) -> bool:
        """Whether later tokens count from what is held."""
        return self.faithful

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention of the CLS token in the last layer."""
        return (tower.attention(tower.layers - 1),)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Filter every image."""
        words = [text.after for text in batch.text]
        kept = []
        for image, attention in enumerate(batch.attention_of(words)):
            scores = FilterScores(attention.sum(0), attention.amax(0))
            protected = torch.isin(batch.indices[image], self.key_tokens(batch, image))
            budget = batch.budgets[image]
            if self.keep is None and budget is None:
                stays = important(scores, self.global_threshold, self.individual_threshold) | protected
                kept.append(stays.nonzero().flatten())
                continue
            count = self._count(batch, image) if budget is None else budget
            strength = scaled_strength(scores, self.global_threshold, self.individual_threshold)
            # Protected tokens first: a strength is finite, and they rank among each other by it too.
            order = strength + protected * (strength.max() + 1)
            kept.append(segmented_topk(order, (0, len(order)), (min(len(order), count),)))
        return Selection(torch.cat(kept), tuple(map(len, kept)))

    def key_tokens(self, batch: LayerBatch, image: int) -> Tensor:
        """Return the protected tokens of an image, as indices into its own order."""
        number = batch.images[image]
        if number not in batch.memory:
            (attention,) = batch.vision.values()
            span = slice(batch.offsets[image], batch.offsets[image + 1])
            batch.memory[number] = batch.indices[image][key_set(attention[span].mean(-1), self.key_rate)]
        found: Tensor = batch.memory[number]
        return found

    def own_macs(self, scored: ScoredLayers) -> int:
        """Nothing beyond the attention."""
        return 0

    def _count(self, batch: LayerBatch, image: int) -> int:
        """Return how many tokens of an image stay at a cut, by `keep`."""
        assert self.keep is not None
        total, entered, cuts = batch.totals[image], batch.entered[image], self.cut_layers(batch.layers)
        wanted = self.keep if isinstance(self.keep, int) else self.keep * total
        if wanted >= entered:
            return entered
        rate = solve_shares(
            wanted / entered, batch.layers, cuts, lambda x: tuple(x ** (1 + cut) for cut in range(len(cuts)))
        )
        if rate is None:
            raise unreachable(wanted / total, batch.layers, cuts[0])
        return max(1, round(entered * rate ** (1 + cuts.index(batch.layer))))


def key_set(attention: Tensor, rate: float) -> Tensor:
    """Return the `ceil(rate * tokens)` tokens with the highest `attention [tokens]`, int64, ascending."""
    count = ceil(rate * len(attention))
    return segmented_topk(attention, (0, len(attention)), (count,))


def important(scores: FilterScores, global_threshold: float, individual_threshold: float) -> Tensor:
    """Return which tokens fail at least one of the two tests for being dropped, bool `[tokens]`."""
    everything, highest = scores
    return (everything >= global_threshold * everything.sum()) | (highest >= individual_threshold)


def scaled_strength(scores: FilterScores, global_threshold: float, individual_threshold: float) -> Tensor:
    """Return for each token the factor of both thresholds up to which it stays, fp32 `[tokens]`."""
    everything, highest = scores
    return torch.maximum(everything / (global_threshold * everything.sum()), highest / individual_threshold)
