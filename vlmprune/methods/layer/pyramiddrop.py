"""PyramidDrop: fewer and fewer visual tokens in deeper layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil
from typing import ClassVar

from torch import Tensor

from vlmprune.errors import BudgetError, ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_flag, check_number
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers

# The smallest rate of the paper's ablation (0.4, 0.5, 0.6).
_LOWEST_RATE = 0.4


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(LayerMethod):
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

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    allow_empty: bool = False

    name: ClassVar[str] = "pyramiddrop"
    symbols: ClassVar[Mapping[str, str]] = {
        "lambda": "ratios=(lambda, lambda**2, ...)",
        "S": "the number of layers and ratios, plus one",
        "layer_list": "layers=",
        "image_token_ratio_list": "ratios=, without its leading 1.0",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("allow_empty", self.allow_empty)
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        if self.ratios is None:
            if self.keep is None:
                object.__setattr__(self, "keep", 0.25)
            return
        if self.keep is not None:
            raise ParameterError(
                f"keep={self.keep!r} and ratios={self.ratios!r} both set the budget; give one of them. "
                "keep is the average over layers, ratios are the shares from each stage on."
            )
        object.__setattr__(self, "ratios", check_ratios(self.ratios))
        if self.layers is not None and len(self.layers) != len(self.ratios):
            raise ParameterError(
                f"layers={self.layers} has {len(self.layers)} stages, ratios={self.ratios} has {len(self.ratios)}; "
                "allowed: one ratio a layer."
            )

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers of all stages."""
        if self.layers is not None:
            check_depth("layers", self.layers, layers)
        if self.ratios is not None:
            cuts = self.layers or even_layers(layers, len(self.ratios))
            if len(cuts) != len(self.ratios):
                raise ParameterError(
                    f"ratios={self.ratios} has {len(self.ratios)} stages, but {layers} layers leave room for {len(cuts)} "
                    "even ones."
                )
            return cuts
        check_depth("layers", (), layers)
        if isinstance(self.keep, float):
            return solve_schedule(self.keep, layers, self.layers)[0]
        return self.layers or tuple(sorted({1, *even_layers(layers, 3), *early_layers(layers)}))

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the stages of an image of `total` tokens."""
        if self.ratios is not None:
            counts = stage_counts(total, self.ratios)
            cuts = self.cut_layers(layers)
            for cut, ratio, count in zip(cuts, self.ratios, counts, strict=True):
                if count == 0 and not self.allow_empty:
                    raise BudgetError(
                        f"ratio {ratio} at layer {cut} keeps int({total} * {ratio}) = 0 of an image's {total} visual tokens; "
                        f"allowed: at least {ceil(1e5 / total) / 1e5:g} here, or allow_empty=True to drop all of them."
                    )
            return tuple(LayerCut(cut, count) for cut, count in zip(cuts, counts, strict=True))
        assert self.keep is not None
        share = self.keep / total if isinstance(self.keep, int) else self.keep
        if share >= 1:
            return ()
        try:
            cuts, shares = solve_schedule(share, layers, self.layers)
        except BudgetError:
            if isinstance(self.keep, float):
                raise
            first = self.layers[0] if self.layers is not None else 1
            raise BudgetError(
                f"keep={self.keep} of {total} visual tokens, averaged over {layers} layers, cannot be reached: all tokens pass "
                f"the first {first} layers; nearest: keep={first * total // layers + 1}."
            ) from None
        return tuple(LayerCut(cut, max(1, round(total * part))) for cut, part in zip(cuts, shares, strict=True))

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Take the `budgets[i]` highest scores of each image."""
        assert batch.attention is not None
        budgets = tuple(budget or 0 for budget in batch.budgets)
        return Selection(pyramiddrop_keep(batch.attention, batch.offsets, budgets), budgets)

    def own_macs(self) -> int:
        """Nothing beyond the attention."""
        return 0


def pyramiddrop_keep(attention: Tensor, offsets: Sequence[int], budgets: Sequence[int]) -> Tensor:
    """Return the local indices of the `budgets[i]` highest values of `attention [tokens]` in each segment, ascending."""
    return segmented_topk(attention, offsets, budgets)


def stage_counts(total: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Return the tokens left of `total` after each stage, `int(total * ratio)` as in the official code; 0 is possible."""
    return tuple(int(total * ratio) for ratio in ratios)


def check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """Return `ratios` as a tuple of floats.

    Raises:
        ParameterError: not numbers in [0, 1], or growing.
    """
    allowed = "numbers in [0, 1] that never grow, cumulative shares of the image's tokens"
    if isinstance(ratios, (str, int, float)) or not ratios:
        raise ParameterError(f"ratios={ratios!r}; allowed: {allowed}.")
    for index, ratio in enumerate(ratios):
        check_number(f"ratios[{index}]", ratio, "[0, 1]", "cumulative shares of the image's tokens that never grow")
    for before, after in pairwise(ratios):
        if after > before:
            raise ParameterError(
                f"ratios={tuple(ratios)}: {after} follows {before}, but dropped tokens do not come back; allowed: {allowed}; "
                f"nearest: {tuple(sorted(ratios, reverse=True))}."
            )
    return tuple(float(ratio) for ratio in ratios)


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
    rate = _solve(share, layers, even, lambda x: tuple(x**power for power in powers))
    if rate is not None and (cuts is not None or rate >= _LOWEST_RATE):
        return even, tuple(rate**power for power in powers)
    if cuts is None:
        halves = [0.5**stage for stage in range(len(early))]
        for first_cuts in (early, (1, *early[1:])):
            first = _solve(share, layers, first_cuts, lambda x: tuple(x * half for half in halves))
            if first is not None:
                return first_cuts, tuple(first * half for half in halves)
        if rate is not None:
            return even, tuple(rate**power for power in powers)
    lowest = (cuts[0] if cuts is not None else 1) / layers
    raise BudgetError(
        f"keep={share:g}, averaged over {layers} layers, cannot be reached: all visual tokens pass the first "
        f"{round(lowest * layers)} layers, so the average stays above {lowest:.4g}; nearest: keep={_above(lowest)}."
    )


def _solve(
    share: float, layers: int, cuts: tuple[int, ...], shares: Callable[[float], tuple[float, ...]]
) -> float | None:
    """Find x in (0, 1] for which the average over layers of `shares(x)` is `share`, by bisection; None if there is none."""
    ends = (*cuts[1:], layers)

    def average(x: float) -> float:
        spans = zip(cuts, ends, shares(x), strict=True)
        return (cuts[0] + sum((end - cut) * part for cut, end, part in spans)) / layers

    if not average(0.0) < share <= average(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) < share else (low, middle)
    return high


def _above(lowest: float) -> float:
    """Return the next number above `lowest` with two decimals."""
    return (int(lowest * 100 + 1e-9) + 1) / 100
