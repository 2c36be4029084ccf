"""FastV: one cut after a few layers, by the attention of the last prompt token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor
from typing import ClassVar, Literal

from torch import Tensor

from vlmprune.budget import Keep
from vlmprune.errors import BudgetError, ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_choice, check_number
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers
from vlmprune.methods.needs import LAST_TOKEN_BEFORE_CUT, Need
from vlmprune.methods.selection_macs import ScoredLayers

# How a solved share becomes a number of tokens; it carries rounding errors of its own, which must not cost or add one.
_ROUNDINGS: dict[str, Callable[[float], int]] = {
    "round": round,
    "floor": lambda count: floor(count + 1e-9),
    "ceil": lambda count: ceil(count - 1e-9),
}


@dataclass(frozen=True, kw_only=True)
class FastV(LayerMethod):
    """Drop visual tokens once, at the input of layer K, by the attention that the last prompt token pays them in layer K-1.

    Give `ratio` as in the paper, or `keep`, the average over all layers: `keep * L = K + (L - K) * share` is solved
    for the share that stays after the cut. The paper's setting is `FastV(ratio=0.5)` (K 2, R 0.5), the official
    demo's `FastV(layer=3, ratio=0.75)`; without either, `keep` is 0.25, which on 32 layers is K 2, R 0.8.

    A video is one block of visual tokens, as in the official codes for video models, its newlines among them.

    Positions: original. Kept tokens and everything after them stay where they were, in every layer and decode step.

    Attributes:
        layer: the paper's K, 0-based layer at whose input the tokens are dropped, an int >= 1.
        ratio: the paper's R, the share that is dropped, in [0, 1).
        rounding: "round" keeps `round(N * (1 - R))` tokens as the official code for transformers, "floor" truncates as
            the one for lmms-eval does, whose argument is the kept share: `int(N * (1 - R))`; "ceil" rounds up, as the inner
            step of FlashVID does.

    Source: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models", ECCV 2024, arXiv 2403.06764. The paper ranks by the attention that a token receives from
    all tokens, the official code by that of the last one, as here. The paper's first code keeps no cache and, where
    it only masks, ranks again for every generated token; here, as in the official codes with a cache, tokens are
    ranked once, in the prefill. The official codes take the ranking of row 0 for a whole batch and one block of
    tokens at a fixed place; here every row has its own, and every image its own budget.
    """

    layer: int = 2
    ratio: float | None = None
    rounding: Literal["round", "floor", "ceil"] = "round"

    name: ClassVar[str] = "fastv"
    needs: ClassVar[frozenset[Need]] = frozenset({LAST_TOKEN_BEFORE_CUT})
    symbols: ClassVar[Mapping[str, str]] = {"K": "layer=K", "R": "ratio=R", "keep_ratio": "ratio=1 - keep_ratio"}
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers("layer", (self.layer,))
        check_choice("rounding", self.rounding, ("round", "floor", "ceil"))
        if self.ratio is None:
            if self.keep is None:
                object.__setattr__(self, "keep", 0.25)
            return
        if self.keep is not None:
            raise ParameterError(
                f"keep={self.keep!r} and ratio={self.ratio!r} both set the budget; give one of them. "
                "keep is the average over layers, ratio is the share dropped at the cut."
            )
        check_number("ratio", self.ratio, "[0, 1)", "the share that is dropped")

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the one layer."""
        check_depth("layer", (self.layer,), layers)
        if isinstance(self.keep, float):
            share_after_cut(self.keep, self.layer, layers)
        return (self.layer,)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the one cut."""
        if self.ratio is not None:
            count = fastv_count(total, self.ratio, self.rounding)
            if count == 0:
                nearest = floor((1 - 1 / total) * 1e4) / 1e4
                raise BudgetError(
                    f"ratio={self.ratio} keeps none of an image's {total} visual tokens; nearest: ratio={nearest:g}."
                )
            return (LayerCut(self.layer, count),)
        assert self.keep is not None
        if self.keep >= (total if isinstance(self.keep, int) else 1):
            return ()
        share = share_after_cut(self.keep, self.layer, layers, total)
        count = _ROUNDINGS[self.rounding](total * share)
        return (LayerCut(self.layer, max(1, count)),)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Take the `budgets[i]` highest scores of each image."""
        assert batch.attention is not None
        budgets = tuple(budget or 0 for budget in batch.budgets)
        return Selection(fastv_keep(batch.attention, batch.offsets, budgets), budgets, scores=batch.attention)

    def own_macs(self, scored: ScoredLayers) -> int:
        """Nothing beyond the attention."""
        return 0


def fastv_keep(attention: Tensor, offsets: Sequence[int], budgets: Sequence[int]) -> Tensor:
    """Return the local indices of the `budgets[i]` highest values of `attention [tokens]` in each segment, ascending."""
    return segmented_topk(attention, offsets, budgets)


def fastv_count(total: int, ratio: float, rounding: str = "round") -> int:
    """Return how many of `total` tokens stay when the share `ratio` is dropped.

    "floor" is `int(total * keep)` for the number `keep` that `ratio` was made from: `1 - 0.9` is a little less than
    0.1, and one token would be lost. "ceil" likewise.
    """
    if rounding == "round":
        return round(total * (1 - ratio))
    kept = total * float(1 - Decimal(repr(float(ratio))))
    return int(kept) if rounding == "floor" else ceil(kept)


def share_after_cut(keep: Keep, cut: int, layers: int, total: int = 1) -> float:
    """Return the share of tokens after the cut for which the average over layers is `keep`; at most 1.

    Raises:
        BudgetError: the layers before the cut alone exceed the average.
    """
    average = keep / total if isinstance(keep, int) else keep
    share = (average * layers - cut) / (layers - cut)
    if share <= 0:
        nearest = (
            f"{cut * total // layers + 1}" if isinstance(keep, int) else f"{(int(cut / layers * 100 + 1e-9) + 1) / 100}"
        )
        raise BudgetError(
            f"keep={keep}, averaged over {layers} layers, cannot be reached: all visual tokens pass the first {cut} layers; "
            f"nearest: keep={nearest}, or a layer below the present layer={cut}."
        )
    return min(share, 1.0)
