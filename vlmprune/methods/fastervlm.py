"""FasterVLM: top-k by the CLS attention of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.kernels.segmented_topk import segmented_topk

from .base import Method
from .visual_batch import Selection, TowerFacts, VisionSignal, VisualBatch


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Method):
    """Keep the tokens that the vision tower's CLS token attends to most.

    The score is the softmaxed CLS attention (over all keys, CLS included, not renormalised) of the layer whose output becomes
    the visual tokens, averaged over heads. Kept tokens stay in raster order.

    Source: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818v1.
    The official code scores in the model's half precision; here scores are fp32, ties go to the lowest index.
    """

    name: ClassVar[str] = "fastervlm"
    needs_cls: ClassVar[bool] = True

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the CLS attention of the feature layer."""
        return (VisionSignal("cls_attention", tower.feature_layer),)

    def select(self, batch: VisualBatch) -> Selection:
        """Take the `budgets[i]` highest scores of each image."""
        attention = batch.vision[VisionSignal("cls_attention", batch.tower.feature_layer)]
        kept = segmented_topk(fastervlm_score(attention), batch.offsets, batch.budgets)
        return Selection(kept, batch.budgets)


def fastervlm_score(cls_attention: Tensor) -> Tensor:
    """Return the mean over heads of `cls_attention [tokens, heads]`: `[tokens]` fp32."""
    return cls_attention.float().mean(-1)
