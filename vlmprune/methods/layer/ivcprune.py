"""IVC-Prune: tokens that carry position, and tokens whose values resemble the question's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_choice, check_number
from vlmprune.methods.layer.fastv import share_after_cut
from vlmprune.methods.layer.ivcprune_image import IVCChoice, IVCCounts, choose
from vlmprune.methods.layer.ivcprune_tiles import PositionsBy, choose_by_tiles, tile_places
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers
from vlmprune.methods.needs import STILL_IMAGES, VALUES_BEFORE_CUT, Need
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.shared.rotary_coordinates import rotary_tables, table_means

Variant = Literal["qwen2.5-vl", "llava-1.5", "internvl2.5", "deepseek-vl2"]

# Tokens of the largest mean cosine (and as many of the largest mean sine), as a share of the tokens that stay.
_POSITIONS: Mapping[Variant, float] = {
    "qwen2.5-vl": 0.2,
    "llava-1.5": 0.25,
    "internvl2.5": 0.2,
    "deepseek-vl2": 0.2,
}
# By what the crops' tokens that carry position are counted, and their share of the tokens that stay, for cosine and for sine.
_CROPS: Mapping[Variant, tuple[PositionsBy, float]] = {"internvl2.5": ("tile", 0.2), "deepseek-vl2": ("row", 0.3)}
_SEEDS = 0.01
# The first tokens after the image that are not asked: the end of the image, a newline.
_SKIPPED = 2


@dataclass(frozen=True, kw_only=True)
class IVCPrune(LayerMethod):
    """Drop visual tokens once, late, and keep those that carry position: the method for grounding.

    Three rules meet. Tokens of the largest mean rotary cosine and of the largest mean rotary sine stay, because their
    positions are nearly the identity or a quarter turn, from which the model reads coordinates. So do seeds, the 1 % of
    tokens whose values in the layer before the cut resemble those of the text after the image most (softmax of `v v^T /
    sqrt(head_dim)`, mean over heads and text). The others are taken by the same similarity to text and seeds together.
    The text is what follows the image without its first two tokens; all of it if there are no more than two, and what
    stands before the image if nothing follows. When the prefill ends the caches of all layers hold the same tokens.

    `share` is the share that stays from the cut on; a fifth of it are tokens by cosine, a fifth tokens by sine.
    The paper's setting is `IVCPrune(share=0.5)`, at layer L/2: 16 of 32, on average 0.75 of the tokens; for Qwen2.5-VL it
    has 16 of 28 layers (`layer=16`) and 22 of 36. `IVCPrune(share=0.2, variant="llava-1.5")` is the paper's for LLaVA:
    similarities compete with the text's, and what stays is the union of the best 20 %, the seeds, and 5 % + 5 % by
    position, so that its size follows from the image. With `keep`, the average over layers, both keep a fixed number:
    `keep * L = K + (L - K) * share` is solved for the share, and without `layer` K is the latest layer up to L/2 that
    leaves a share of at least half of `keep`. Without parameters `keep` is 0.25. The official code knows its own budgets
    only.

    `variant="internvl2.5"` and `"deepseek-vl2"` are the rules for images cut in tiles. Text and seeds ask the thumbnail alone,
    of which as large a share stays as of the image, by the rule above; of the crops stay the tokens whose centre one of
    these shows, and in every tile (with "deepseek-vl2" in every row of the stitched crops) those that carry position: of
    0.5 a tenth by cosine and by sine, 0.15 in rows. If that is too many the first in the image's order stay, as in the
    official code; if too few the thumbnail fills up by similarity, then crops as the thumbnail's tokens that show them. Both
    are the rule of "qwen2.5-vl" for an image that is one tile.

    Positions: original; decoding goes on at the full prompt's.

    Attributes:
        layer: the paper's k, 0-based layer at whose input the tokens are dropped; None for L/2, or as `keep` asks for.
        share: share of an image's tokens that stays after the cut, in (0, 1].
        variant: "qwen2.5-vl", "llava-1.5", "internvl2.5" or "deepseek-vl2", the rules of the official code.

    Source: "IVC-Prune: Revealing the Implicit Visual Coordinates in LVLMs for Vision Token Pruning", ICLR 2026, arXiv
    2602.03060. The official code takes one image a prompt and counts later ones as text; here every image has its own
    budget and text. Its tables have the model's dtype, in which many tokens tie; here they are fp32 and ties go to the
    lowest index. Where rules want more tokens than stay it exceeds the number; here the most similar of them stay. The
    paper speaks of attention; what the code computes is the similarity of values, as here. The official InternVL has its
    thumbnail behind the crops, so that too many tokens cost the thumbnail there, and the last crops where it comes first;
    newlines, of which DeepSeek-VL2's rows hold one, are in no tile and no row here.
    """

    layer: int | None = None
    share: float | None = None
    variant: Variant = "qwen2.5-vl"

    name: ClassVar[str] = "ivcprune"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, VALUES_BEFORE_CUT})
    symbols: ClassVar[Mapping[str, str]] = {"k": "layer=k"}
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, tuple(_POSITIONS))
        if self.keep_positions:
            raise ParameterError(
                "keep_positions=True: 'ivcprune' keeps these tokens by its own rule; allowed: keep_positions=False."
            )
        if self.layer is not None:
            check_layers("layer", (self.layer,))
        if self.share is None:
            if self.keep is None:
                object.__setattr__(self, "keep", 0.25)
            return
        if self.keep is not None:
            raise ParameterError(
                f"keep={self.keep!r} and share={self.share!r} both set the budget; give one of them. "
                "keep is the average over layers, share is what stays from the cut on."
            )
        check_number("share", self.share, "(0, 1]", "the share of an image's tokens that stays after the cut")

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the one layer; all where it may be if that depends on the image."""
        check_depth("layer", () if self.layer is None else (self.layer,), layers)
        if isinstance(self.keep, int) and self.layer is None:
            return tuple(range(1, layers // 2 + 1))
        cut = self._layer(layers)
        if isinstance(self.keep, float):
            share_after_cut(self.keep, cut, layers)
        return (cut,)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the one cut; without a count where the union of the rules decides."""
        if self.keep is None:
            return (LayerCut(self._layer(layers), self.counts(total).total),)
        if self.keep >= (total if isinstance(self.keep, int) else 1):
            return ()
        cut = self._layer(layers, total)
        return (LayerCut(cut, max(1, round(total * share_after_cut(self.keep, cut, layers, total)))),)

    def trims_cache(self, layers: int) -> int:
        """All layers hold the tokens of the cut when the prefill ends."""
        return 0

    def counts(self, total: int, kept: int | None = None) -> IVCCounts:
        """Return how many of `total` tokens each rule takes; `kept` of them stay if that is fixed."""
        share = self.share if kept is None else kept / total
        assert share is not None
        if kept is None and (self.variant != "llava-1.5" or share == 1):
            kept = max(1, round(share * total))
        return IVCCounts(
            seeds=max(1, round(_SEEDS * total)),
            positions=round(_POSITIONS[self.variant] * share * total),
            best=round(share * total),
            total=kept,
        )

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Choose the tokens of every image."""
        kept = [self.kept(batch, image) for image in range(len(batch.counts))]
        return Selection(torch.cat(kept), tuple(len(own) for own in kept))

    def kept(self, batch: LayerBatch, image: int) -> Tensor:
        """Return the tokens of one image that stay, int64, ascending; by tiles where the variant and the image have them."""
        places = None
        if self.variant in _CROPS:
            by, positions = _CROPS[self.variant]
            places = tile_places(batch.layouts[image], batch.indices[image], by)
        if places is None:
            return self.choose(batch, image).kept
        total = self.counts(batch.counts[image], self._budget(batch, image)).total
        assert total is not None
        share = total / batch.counts[image]
        cosines, sines = self._coordinates(batch, image)

        def of_thumbnail(tokens: Tensor) -> IVCChoice:
            counts = self.counts(len(tokens), max(1, round(share * len(tokens))))
            return self._choose_among(batch, image, tokens, cosines, sines, counts)

        return choose_by_tiles(places, cosines, sines, of_thumbnail, positions * share, total)

    def choose(self, batch: LayerBatch, image: int) -> IVCChoice:
        """Choose the tokens of one image as if it were one tile."""
        cosines, sines = self._coordinates(batch, image)
        counts = self.counts(batch.counts[image], self._budget(batch, image))
        tokens = torch.arange(batch.counts[image], device=cosines.device)
        return self._choose_among(batch, image, tokens, cosines, sines, counts)

    def _budget(self, batch: LayerBatch, image: int) -> int | None:
        return batch.budgets[image] if self.keep is not None else None

    def _coordinates(self, batch: LayerBatch, image: int) -> tuple[Tensor, Tensor]:
        """Return the mean rotary cosines and sines of an image's tokens, fp32 `[tokens]`."""
        probed, row, columns = batch.probed, batch.rows[image], batch.columns[image]
        assert probed is not None
        assert probed.value is not None
        assert probed.inverse_frequencies is not None
        valid = None if batch.valid is None else batch.valid[row]
        positions = probed.positions
        positions = positions[-3:, row] if positions.ndim == 3 else positions[row][None]
        if probed.key.shape[1] == probed.value.shape[1]:
            # Some hosts count the padding of a first prompt, and coordinates are absolute.
            positions = positions - (positions if valid is None else positions[:, valid]).amin()
        cosines, sines = rotary_tables(positions[:, columns], probed.inverse_frequencies)
        return table_means(cosines), table_means(sines)

    def _choose_among(
        self, batch: LayerBatch, image: int, tokens: Tensor, cosines: Tensor, sines: Tensor, counts: IVCCounts
    ) -> IVCChoice:
        """Choose among `tokens` of one image."""
        probed, row = batch.probed, batch.rows[image]
        assert probed is not None
        assert probed.value is not None
        return choose(
            probed.value[row],
            batch.columns[image][tokens],
            asking_text(batch, image),
            cosines[tokens],
            sines[tokens],
            counts,
            all_keys=self.variant == "llava-1.5",
            valid=None if batch.valid is None else batch.valid[row],
        )

    def own_macs(self, scored: ScoredLayers) -> int:
        """The text's values times those of the image, and the seeds' times those of the image."""
        (cut,) = self.cut_layers(len(scored.visual))[-1:]
        entered = scored.visual[cut - 1]
        width = scored.kv_heads * scored.head_dim
        keys = entered + (scored.text if self.variant == "llava-1.5" else 0)
        return (scored.text + max(1, round(_SEEDS * entered))) * keys * width

    def _layer(self, layers: int, total: int = 1) -> int:
        if self.layer is not None:
            return self.layer
        deepest = max(1, layers // 2)
        if self.keep is None:
            return deepest
        average = self.keep / total if isinstance(self.keep, int) else self.keep
        return min(deepest, max(1, floor(layers * average / (2 - average) + 1e-9)))


def asking_text(batch: LayerBatch, image: int) -> Tensor:
    """Return the columns of the text whose values an image's tokens are compared with, int64."""
    after = batch.text[image].after
    if len(after) > _SKIPPED:
        return after[_SKIPPED:]
    return after if len(after) else batch.text[image].before
