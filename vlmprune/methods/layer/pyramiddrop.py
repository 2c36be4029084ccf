"""PyramidDrop: fewer and fewer visual tokens in deeper layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.layer_method import LayerBatch
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.staged_method import StagedMethod, solve_shares, unreachable

# The smallest rate of the paper's ablation (0.4, 0.5, 0.6).
_LOWEST_RATE = 0.4


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedMethod):
    """Drop visual tokens in stages inside the language model, by the attention of the last prompt token.

    At the input of each layer in `layers` the tokens are ranked by that layer's own attention (its norm, query of the
    last prompt token, all keys, fp32 softmax over the whole sequence, mean over heads); the best stay, in position
    order.

    Either give `ratios` (and `layers`), or `keep`, the average over all layers, from which a schedule is solved: with
    `layers`, stage j keeps the share `rate**j`; without, cuts at L/4, L/2 and 3L/4 with `rate**j` while the rate is
    at least 0.4 (the lowest in the paper); below that, cuts at L/16, 10L/32 and 20L/32 with shares r, r/2, r/4 (2,
    10, 20 of 32); where even that is too much, the first cut moves to layer 1, which leaves averages above 1/L within
    reach. Solved shares are rounded half to even, at least one token an image.

    The paper's setting (lambda 0.5, S 4 stages) is `PyramidDrop(layers=(8, 16, 24), ratios=(0.5, 0.25, 0.125))` on 32
    layers, an average of 0.47; without parameters `keep` is 0.25, which keeps less. The paper publishes no settings
    for its averages of 192, 128 and 64.

    Positions: as before the first layer: with 1-D rotary positions gaps are closed at every stage, as in the official
    code; M-RoPE ids, for which there is no official code, stay those of the full prompt.

    Attributes:
        layers: 0-based layers at whose input tokens are dropped (the paper counts completed layers: the same numbers).
        ratios: share of the image's tokens that stays from each of these layers on, `int(N * ratio)`; never growing.
        allow_empty: whether an image may lose all tokens because `int(N * ratio)` is 0, as in the official code; else an error.

    Source: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
    (CVPR 2025 as "Conical Visual Concentration for Efficient Large Vision-Language Models"), arXiv 2410.17247. The
    paper ranks with queries and keys of the last layer of a stage, the official code with those of the layer after
    it, as here. The paper compares with image tokens only; the official code takes the softmax over the whole
    sequence, as here. The paper drops `ceil((1 - lambda) n)` of the tokens alive, the official code keeps `int(N *
    ratio)` of all N, as here with `ratios`. The paper splits the layers evenly, the official code cuts at 8, 16 and
    24 also in 40 layers; here `layers` says, or they are split evenly. The official code scores in half precision and
    for one image a prompt; here in fp32 and image by image.
    """

    name: ClassVar[str] = "pyramiddrop"
    symbols: ClassVar[Mapping[str, str]] = {
        "lambda": "ratios=(lambda, lambda**2, ...)",
        "S": "the number of layers and ratios, plus one",
        "layer_list": "layers=",
        "image_token_ratio_list": "ratios=, without its leading 1.0",
    }

    def default_cuts(self, layers: int, stages: int) -> tuple[int, ...]:
        """Return the cuts that split the layers in even parts."""
        return even_layers(layers, stages)

    def possible_cuts(self, layers: int) -> tuple[int, ...]:
        """Return the layers of all schedules."""
        return tuple(sorted({1, *even_layers(layers, 3), *early_layers(layers)}))

    def solved_stages(self, share: float, layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the schedule by the rule above."""
        return solve_schedule(share, layers, self.layers)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Take the `budgets[i]` highest scores of each image."""
        assert batch.attention is not None
        budgets = tuple(budget or 0 for budget in batch.budgets)
        return Selection(pyramiddrop_keep(batch.attention, batch.offsets, budgets), budgets, scores=batch.attention)

    def own_macs(self, scored: ScoredLayers) -> int:
        """Nothing beyond the attention."""
        return 0


def pyramiddrop_keep(attention: Tensor, offsets: Sequence[int], budgets: Sequence[int]) -> Tensor:
    """Return the local indices of the `budgets[i]` highest values of `attention [tokens]` in each segment, ascending."""
    return segmented_topk(attention, offsets, budgets)


@lru_cache(maxsize=256)
def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Return the cuts that split `layers` in `stages + 1` even parts; fewer where there is no room."""
    cuts = {max(1, round(layers * stage / (stages + 1))) for stage in range(1, stages + 1)}
    return tuple(sorted(cut for cut in cuts if cut < layers))


@lru_cache(maxsize=256)
def early_layers(layers: int) -> tuple[int, ...]:
    """Return the cuts for small budgets: 2, 10 and 20 of 32 layers, scaled; fewer where there is no room."""
    cuts = {max(1, round(layers * cut / 32)) for cut in (2, 10, 20)}
    return tuple(sorted(cut for cut in cuts if cut < layers))


@lru_cache(maxsize=1024)
def solve_schedule(
    share: float, layers: int, cuts: tuple[int, ...] | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return cuts and cumulative shares whose average over `layers` layers is `share`; rule in `PyramidDrop`.

    Raises:
        BudgetError: the average cannot be reached; names the lowest one that can.
    """
    if share >= 1:
        return cuts or even_layers(layers, 3), (1.0,) * len(cuts or even_layers(layers, 3))
    even, early = cuts or even_layers(layers, 3), early_layers(layers)
    powers = [1.0 + stage for stage in range(len(even))]
    rate = solve_shares(share, layers, even, lambda x: tuple(x**power for power in powers))
    if rate is not None and (cuts is not None or rate >= _LOWEST_RATE):
        return even, tuple(rate**power for power in powers)
    if cuts is None:
        halves = [0.5**stage for stage in range(len(early))]
        for first_cuts in (early, (1, *early[1:])):
            first = solve_shares(share, layers, first_cuts, lambda x: tuple(x * half for half in halves))
            if first is not None:
                return first_cuts, tuple(first * half for half in halves)
        if rate is not None:
            return even, tuple(rate**power for power in powers)
    raise unreachable(share, layers, cuts[0] if cuts is not None else 1)
