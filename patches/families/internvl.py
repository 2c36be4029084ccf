"""InternVL 2.5 to 3.5: `InternVLForConditionalGeneration` with an InternViT tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from vlmprune.methods.batch import TowerFacts

from ..parts import Part
from .facts import Preparation, dense_tower_facts
from .shuffled_tiles import ShuffledTiles


class InternVL(ShuffledTiles):
    """Crops first, thumbnail last, all their tokens in one run; frames of videos are tiles too."""

    name: ClassVar[str] = "InternVL"
    model_classes: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[Preparation] = Preparation("InternVLProcessor", "GotOcr2ImageProcessor")
    vision_projections: ClassVar[tuple[str, str]] = ("q_norm", "k_norm")
    tower_parts: ClassVar[tuple[Part, ...]] = (
        Part("vision_layers.*.attention.q_norm"),
        Part("vision_layers.*.attention.k_norm"),
        Part("projector"),
    )

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Return the facts of the tower; its token 0 is a CLS token."""
        side = round(1 / config.downsample_ratio)
        return replace(dense_tower_facts(config), has_cls=True, patches_per_token=side**2)

    @property
    def cell_side(self) -> int:
        """One over the ratio by which pixels are shuffled."""
        return round(1 / self.config.downsample_ratio)

    @property
    def vision_layers(self) -> nn.ModuleList:
        """The encoder layers of the tower."""
        return self.vision_tower.encoder.layer  # type: ignore[union-attr, return-value]

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `attention` of an encoder layer."""
        return self.vision_layers[layer].attention  # type: ignore[return-value]

    @property
    def has_tower_attention(self) -> bool:
        """True for InternViT."""
        encoder = getattr(self.vision_tower, "encoder", None)
        return isinstance(getattr(encoder, "layer", None), nn.ModuleList)
