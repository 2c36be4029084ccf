"""ToDRE: the most different tokens at the input, and none in late layers that no longer look at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.kernels.max_min import max_min
from vlmprune.kernels.max_sum import max_sum
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.layout import VisualLayout
from vlmprune.methods.base import Method
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag
from vlmprune.methods.layer.todre_relevance import ToDRERelevance
from vlmprune.methods.needs import TOWER_ATTENTION, Need
from vlmprune.methods.picture_method import FrameOrVideoMethod
from vlmprune.methods.selection_macs import Scored, picked_rows_macs
from vlmprune.methods.shared.patches import patch_budgets, patches_of, select_patches
from vlmprune.methods.shared.tile_segments import to_device


@dataclass(frozen=True, kw_only=True)
class ToDRE(FrameOrVideoMethod):
    """Keep tokens greedily, each with the lowest sum of cosines to those kept before ("max_sum"), from a pivot on.

    The pivot is the token with the highest CLS attention (mean over heads) of the last vision tower layer, in the
    thumbnail where there is one; without a CLS token, the one that receives the most attention in the feature layer.
    Newlines are dropped first. Kept tokens stay in position order; ties go to the lowest index.

    The second stage, `ToDRERelevance`, drops all visual tokens of a row at a late layer of the language model if text
    and image hardly look at each other there. `keep` counts the tokens of the first stage; `keep=1.0` drops nothing
    at all.

    Videos are served too, every frame as an image with an even share of the budget, or all frames at once: `per="video"`.

    Source: "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv 2505.18757. There is
    no official code. The paper draws a random pivot where there is no CLS token and says nothing of newlines and of
    the order.

    Attributes:
        variant: "max_sum" as version 2 of the paper, "kcenter" for the farthest token from all kept ones (the words
            of version 1).
        relevance: whether the second stage runs.
        keep: the paper's K tokens as an int, or their share.
        layer: 0-based layer (l) of the second stage; `floor(7L / 8)` if not given.
        tau: threshold of the second stage.
    """

    variant: Literal["max_sum", "kcenter"] = "max_sum"
    relevance: bool = True
    layer: int | None = None
    tau: float = 0.1

    name: ClassVar[str] = "todre"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_ATTENTION})
    symbols: ClassVar[Mapping[str, str]] = {"K": "keep as an int, the number kept per image", "l": "layer="}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, ("max_sum", "kcenter"))
        check_flag("relevance", self.relevance)
        self.parts()

    def parts(self) -> tuple[Method, ...]:
        """Return this first stage, and the second one unless it is switched off or nothing is to be dropped."""
        second = ToDRERelevance(layer=self.layer, tau=self.tau)
        return (self, second) if self.relevance and self.keep != 1.0 else (self,)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention that the pivot is found by."""
        return (tower.attention(tower.layers - 1 if tower.has_cls else tower.feature_layer),)

    def select(self, batch: VisualBatch) -> Selection:
        """Pick `budgets[i]` tokens of each image."""
        return select_patches(self.order(batch), batch)

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of the picks with all tokens."""
        return picked_rows_macs(scored)

    def order(self, batch: VisualBatch) -> Tensor:
        """Return the picks of each image in the order in which they are made, pivot first: int64 indices among its patches."""
        device, patches = batch.features.device, patches_of(batch.layouts)
        indices, in_thumbnail = (to_device(kind, device) for kind in (patches.indices, _in_thumbnail(batch.layouts)))
        (signal,) = self.vision_signals(batch.tower)
        counts = patch_budgets(batch)
        scores = batch.vision[signal].float().mean(-1)[indices]
        pivots = segmented_topk(scores.masked_fill(~in_thumbnail, -torch.inf), patches.offsets, [1] * len(counts))
        choose = max_sum if self.variant == "max_sum" else max_min
        return choose(batch.features[indices], patches.offsets, counts, seeds=pivots)


@lru_cache(maxsize=64)
def _in_thumbnail(layouts: tuple[VisualLayout, ...]) -> Tensor:
    """Return which of the patches lie in a thumbnail."""
    return torch.cat([layout.tile for layout in layouts])[patches_of(layouts).indices] == 0
