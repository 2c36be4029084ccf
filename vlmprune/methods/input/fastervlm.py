"""FasterVLM: top-k by the CLS attention of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.needs import TOWER_ATTENTION, Need
from vlmprune.methods.picture_method import FrameOrVideoMethod
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.tile_segments import select_evenly


@dataclass(frozen=True, kw_only=True)
class FasterVLM(FrameOrVideoMethod):
    """Keep the tokens that the vision tower's CLS token attends to most.

    The score is the softmaxed CLS attention (over all keys, CLS included, not renormalised) of the layer whose output
    becomes the visual tokens, averaged over heads. Every tile of a tiled image keeps the same number of tokens, as
    far as it has that many; newlines are dropped first. Kept tokens stay in raster order. A tower without CLS token
    is scored by the attention that a token receives from all tokens.

    Of the paper's symbols, the reduction ratio R is `1 - keep`; T tokens a tile are `keep=T * tiles`.

    Videos are served too, every frame as an image with an even share of the budget, or all frames at once: `per="video"`.

    Source: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818v1. The official
    code scores in the model's half precision; here scores are fp32, ties go to the lowest index. On LLaVA-NeXT it
    also selects among padding tokens, which transformers' models do not have.
    """

    name: ClassVar[str] = "fastervlm"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_ATTENTION})
    symbols: ClassVar[Mapping[str, str]] = {
        "R": "keep=1 - R",
        "T": "keep=T * tiles, per image",
        "visual_token_num": "keep=visual_token_num * tiles, per image",
    }

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the CLS attention of the feature layer."""
        return (tower.attention(tower.feature_layer),)

    def select(self, batch: VisualBatch) -> Selection:
        """Take the highest scores, `budgets[i]` of each image."""
        attention = batch.vision[batch.tower.attention(batch.tower.feature_layer)]
        return select_evenly(fastervlm_score(attention), batch)

    def feature_macs(self, scored: Scored) -> int:
        """Nothing beyond the attention."""
        return 0


def fastervlm_score(attention: Tensor) -> Tensor:
    """Return the mean over heads of `attention [..., heads]` in fp32."""
    return attention.float().mean(-1)
