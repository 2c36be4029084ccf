"""Towers at `vision_tower` whose layers are `encoder.layers`, as transformers builds CLIP's, SigLIP's and Gemma 4's."""

from __future__ import annotations

from typing import Any

from torch import nn

from .family import Family
from .wrappers import without_wrappers


class EncoderTower(Family):
    """Where the parts of such a tower are."""

    @property
    def vision_tower(self) -> nn.Module:
        """The vision model."""
        return without_wrappers(self.multimodal_model.vision_tower)  # type: ignore[arg-type]

    @property
    def vision_layers(self) -> nn.ModuleList:
        """The encoder layers of the tower."""
        tower: Any = getattr(self.vision_tower, "vision_model", self.vision_tower)
        return tower.encoder.layers

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `self_attn` of an encoder layer."""
        return self.vision_layers[layer].self_attn  # type: ignore[return-value]

    def vision_layer(self, layer: int) -> nn.Module:
        """Return an encoder layer."""
        return self.vision_layers[layer]
