"""DivPrune: the subset whose tokens are farthest from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.kernels.max_min import max_min
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.needs import Need
from vlmprune.methods.picture_method import FrameOrVideoMethod
from vlmprune.methods.selection_macs import Scored, all_pairs_macs


@dataclass(frozen=True, kw_only=True)
class DivPrune(FrameOrVideoMethod):
    """Keep tokens greedily so that the smallest cosine distance among them stays as large as possible.

    First pick: the token whose nearest neighbour is farthest; every next pick: the token farthest from all picked
    ones. Ties go to the lowest index; kept tokens stay in position order.

    The paper's K tokens are `keep` as an int, its share of tokens `keep` as a float.

    Source: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv 2503.02175.
    The official code computes distances in the model's dtype and may pick a duplicate twice; here distances are fp32
    and picked tokens are masked. Of a video it picks among the tokens of all frames, so that a token that stands still is
    picked once.

    Attributes:
        per: "video" to pick among all frames of a video at once, "frame" to pick in every frame by itself.
    """

    per: Literal["frame", "video"] = "video"

    name: ClassVar[str] = "divprune"
    needs: ClassVar[frozenset[Need]] = frozenset()
    symbols: ClassVar[Mapping[str, str]] = {
        "K": "keep as an int, the number kept per image",
        "ratio": "keep=ratio",
        "subset_ratio": "keep=subset_ratio",
    }

    def select(self, batch: VisualBatch) -> Selection:
        """Pick `budgets[i]` tokens of each image."""
        return Selection(sort_segments(divprune_order(batch), batch.budgets), batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of all pairs."""
        return all_pairs_macs(scored)


def divprune_order(batch: VisualBatch) -> Tensor:
    """Return the picks of every image in the order in which they are made: local indices, int64 `[sum(budgets)]`."""
    return max_min(batch.features, batch.offsets, batch.budgets)


def sort_segments(indices: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Sort local `indices [sum(counts)]` ascending inside each segment of `counts`, without waiting for the device."""
    if len(counts) == 1:
        return indices.sort().values
    segment = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(indices.device)
    offset = segment << 40
    return (indices + offset).sort().values - offset
