"""DART: one cut after a few layers, by how little a token repeats a few pivots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.errors import ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_int, check_number
from vlmprune.methods.layer.fastv import share_after_cut
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers
from vlmprune.methods.needs import KEYS_BEFORE_CUT, STILL_IMAGES, Need
from vlmprune.methods.selection_macs import ScoredLayers


class Claims(NamedTuple):
    """How the tokens of one image are chosen.

    Attributes:
        image_pivots: int64, indices among the image's tokens, falling norm.
        text_pivots: int64, indices among the text behind it, falling norm.
        claimed: per pivot, image pivots first, the indices that it claims, most dissimilar first.
    """

    image_pivots: Tensor
    text_pivots: Tensor
    claimed: tuple[Tensor, ...]

    @property
    def kept(self) -> Tensor:
        """Pivots of the image and claimed tokens, int64, ascending."""
        return torch.cat([self.image_pivots, *self.claimed]).sort().values


@dataclass(frozen=True, kw_only=True)
class DART(LayerMethod):
    """Drop visual tokens once, at the input of layer K, and keep those that are most unlike a few pivots.

    Pivots are the visual tokens, and the text tokens behind the image, whose keys in layer K-1 (rotary positions applied) have
    the largest L1 norm. One after the other each claims, of the tokens that are not claimed yet, those with the lowest cosine to
    it, of the states that enter layer K under the model's final norm. Kept are the image's pivots and all claimed tokens; text
    pivots only steer.

    Give `tokens` or `ratio` as the official codes do, or `keep`, the average over all layers, which is solved for the number
    that stays after the cut and met exactly: what the pivots cannot share evenly goes to the first ones. The paper's setting on
    32 layers and 576 tokens is `DART(tokens=128)`, which keeps 132 (4 + 8 * 16), on LLaVA-NeXT `DART(tokens=320)`, for
    Qwen2-VL `DART(ratio=0.778)`; without either, `keep` is 0.25.

    Positions: original. Kept tokens and everything after them stay where they were, in every layer and decode step.

    Attributes:
        layer: the paper's K, 0-based layer at whose input the tokens are dropped, an int >= 1; by default a sixteenth of the
            layers, 2 of 32.
        tokens: nominal number after the cut: each pivot claims `min(tokens, N - image_pivots) // pivots`, besides those of the
            image.
        ratio: nominal share that is dropped: each pivot claims `int(N * (1 - ratio) / pivots)`.
        image_pivots: pivots among the image's tokens, an int >= 0.
        text_pivots: pivots among the text behind the image, an int >= 0; fewer where there is less text.

    Source: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025, arXiv
    2502.11494. The official code lets the pivots choose in the order of a Python set of positions, roughly their positions
    modulo 32; here image pivots come first, each kind by falling norm (`order_pivots` says otherwise). It compares in the
    model's dtype; here in fp32. It serves one image a prompt and needs 4 text tokens; here every image has its own pivots, and
    where there is less text the others claim more, so that the count is the same.
    """

    layer: int | None = None
    tokens: int | None = None
    ratio: float | None = None
    image_pivots: int = 4
    text_pivots: int = 4

    name: ClassVar[str] = "dart"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, KEYS_BEFORE_CUT})
    symbols: ClassVar[Mapping[str, str]] = {
        "K": "layer=K",
        "max_num_trunction": "tokens=",
        "reduction_ratio": "ratio=",
        "pivot_image_token": "image_pivots=",
        "pivot_text_token": "text_pivots=",
    }
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_layers("layer", (self.layer,))
        check_int("image_pivots", self.image_pivots, 0)
        check_int("text_pivots", self.text_pivots, 0)
        if not self.image_pivots + self.text_pivots:
            raise ParameterError(
                "image_pivots=0 and text_pivots=0; allowed: at least one pivot; nearest: image_pivots=1."
            )
        if self.tokens is not None:
            check_int("tokens", self.tokens, 1)
        if self.ratio is not None:
            check_number("ratio", self.ratio, "[0, 1)", "the share that is dropped")
        given = {name: getattr(self, name) for name in ("keep", "tokens", "ratio") if getattr(self, name) is not None}
        if len(given) > 1:
            named = " and ".join(f"{name}={value!r}" for name, value in given.items())
            raise ParameterError(
                f"{named} set the budget; give one of them. keep is the average over layers, tokens and ratio are the official "
                "codes' nominal numbers after the cut."
            )
        if not given:
            object.__setattr__(self, "keep", 0.25)

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the one layer."""
        cut = max(1, round(layers / 16)) if self.layer is None else self.layer
        check_depth("layer", (cut,), layers)
        if isinstance(self.keep, float):
            share_after_cut(self.keep, cut, layers)
        return (cut,)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the one cut."""
        (cut,) = self.cut_layers(layers)
        if self.keep is None:
            return (LayerCut(cut, min(total, self.nominal_count(total))),)
        if self.keep >= (total if isinstance(self.keep, int) else 1):
            return ()
        return (LayerCut(cut, max(1, round(total * share_after_cut(self.keep, cut, layers, total)))),)

    def nominal_count(self, total: int) -> int:
        """Return how many of `total` tokens the official codes keep for `tokens` or `ratio`."""
        pivots = self.image_pivots + self.text_pivots
        if self.tokens is not None:
            each = max(0, min(self.tokens, total - self.image_pivots)) // pivots
        else:
            assert self.ratio is not None
            each = int(total * (1 - self.ratio) / pivots)
        return max(1, self.image_pivots + pivots * each)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Let the pivots of each image choose."""
        budgets = tuple(budget or 0 for budget in batch.budgets)
        return Selection(torch.cat([claims.kept for claims in self.claims(batch)]), budgets)

    def claims(self, batch: LayerBatch) -> list[Claims]:
        """Return who chooses what in each image."""
        assert batch.probed is not None
        assert batch.hidden is not None
        keys, found = batch.probed.counted_key, []
        for row, columns, text, budget in zip(batch.rows, batch.columns, batch.text, batch.budgets, strict=True):
            norms = [keys[row, places].float().abs().sum((1, 2)) for places in (columns, text.after)]
            image, words = (
                segmented_topk(values, (0, len(values)), (count,), order="score")
                for values, count in zip(
                    norms,
                    (min(self.image_pivots, budget or 0), min(self.text_pivots, len(text.after))),
                    strict=True,
                )
            )
            places = torch.cat([columns[image], text.after[words]])
            pivots = normalize(batch.normalize(batch.hidden[row, places]).float(), dim=-1)
            tokens = normalize(batch.normalize(batch.hidden[row, columns]).float(), dim=-1)
            order = self.order_pivots(columns[image], text.after[words])
            claimed = claim(pivots @ tokens.T, image, (budget or 0) - len(image), order)
            found.append(Claims(image, words, claimed))
        return found

    def order_pivots(self, image: Tensor, text: Tensor) -> Sequence[int]:
        """Return in which order the pivots choose, indices of image pivots and then text pivots.

        Args:
            image: int64 `[pivots]`, their columns, falling norm.
            text: likewise.
        """
        return range(len(image) + len(text))

    def own_macs(self, scored: ScoredLayers) -> int:
        """The cosines of the pivots with all tokens."""
        (cut,) = self.cut_layers(len(scored.visual))
        before, after = scored.visual[cut - 1], scored.visual[cut]
        return (self.image_pivots + self.text_pivots) * before * scored.dim if after < before else 0


def claim(cosines: Tensor, image_pivots: Tensor, count: int, order: Sequence[int]) -> tuple[Tensor, ...]:
    """Let pivots claim tokens one after the other, those with the lowest cosine first; ties go to the lowest index.

    Args:
        cosines: fp32 `[pivots, tokens]`.
        image_pivots: int64, tokens that are claimed before.
        count: tokens to be claimed in all; the first in `order` claim one more where they cannot be shared evenly.
        order: the pivots in the order in which they choose.

    Returns:
        Per pivot, in the order of `cosines`, int64 indices.
    """
    claimed = [image_pivots.new_zeros(0)] * len(cosines)
    scores = (-cosines).index_fill(1, image_pivots, -torch.inf)
    each, rest = divmod(count, max(1, len(order)))
    for turn, pivot in enumerate(order):
        wanted = each + (turn < rest)
        if wanted:
            claimed[pivot] = segmented_topk(scores[pivot], (0, scores.shape[1]), (wanted,), order="score")
            scores = scores.index_fill(1, claimed[pivot], -torch.inf)
    return tuple(claimed)
