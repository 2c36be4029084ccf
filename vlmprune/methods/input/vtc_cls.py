"""VTC-CLS: top-k by the CLS attention of several vision tower layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_int
from vlmprune.methods.needs import TOWER_ATTENTION, Need
from vlmprune.methods.picture_method import FrameOrVideoMethod
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.tile_segments import select_evenly


@dataclass(frozen=True, kw_only=True)
class VTCCLS(FrameOrVideoMethod):
    """Keep the tokens that the CLS tokens of several vision tower layers attend to most, summed over these layers.

    Every layer counts with its softmaxed CLS attention (over all keys, CLS included), averaged over heads. Every tile
    of a tiled image keeps the same number of tokens, as far as it has that many; newlines are dropped first. Kept
    tokens stay in raster order. With `start_layer` equal to the feature layer it is FasterVLM.

    Videos are served too, every frame as an image with an even share of the budget, or all frames at once: `per="video"`.

    Source: "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819. The paper sums
    the last K layers; the official code those from a layer that it is given (16 of 24 by default) to the feature
    layer, the last but one, as here. The official code sums half-precision scores, serves LLaVA-1.5 with one image a
    call, and drops tokens before the projector, which gives the same tokens. Tiles, and the received attention that
    stands in where a tower has no CLS token, are ours.

    Attributes:
        start_layer: first layer of the sum; negative values count from the end as Python's do. The sum ends with the
            layer whose output becomes the visual tokens. -8 is layer 16 of the 24 of CLIP-L, the official default;
            the first layer stands in where a tower has fewer than 8. The paper's K layers are `-(K + 1)`.
    """

    start_layer: int = -8

    name: ClassVar[str] = "vtc_cls"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_ATTENTION})
    symbols: ClassVar[Mapping[str, str]] = {
        "K": "start_layer=-(K + 1), the last K layers up to the feature layer of a CLIP tower",
        "layer": "start_layer=",
        "token_num": "keep as an int, the number kept per image",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("start_layer", self.start_layer)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the CLS attention of the layers `start_layer` to the feature layer.

        Raises:
            ParameterError: the sum would be empty.
        """
        first = self.start_layer if self.start_layer >= 0 else max(0, tower.layers + self.start_layer)
        last = tower.feature_layer
        if first > last:
            raise ParameterError(
                f"start_layer={self.start_layer} begins after layer {last}, whose output becomes the visual tokens; "
                f"allowed: {-tower.layers} to {last}; nearest: {last}."
            )
        return tuple(tower.attention(layer) for layer in range(first, last + 1))

    def select(self, batch: VisualBatch) -> Selection:
        """Take the highest sums, `budgets[i]` of each image."""
        return select_evenly(
            vtc_cls_score([batch.vision[signal] for signal in self.vision_signals(batch.tower)]), batch
        )

    def feature_macs(self, scored: Scored) -> int:
        """Nothing beyond the attention."""
        return 0


def vtc_cls_score(layers: Sequence[Tensor]) -> Tensor:
    """Return the sum over `layers` of the mean over heads of each `[..., heads]` in fp32."""
    return torch.stack([attention.float().mean(-1) for attention in layers]).sum(0)
