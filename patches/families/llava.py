"""LLaVA-1.5: `LlavaForConditionalGeneration` with any CLIP or SigLIP tower and any decoder-only language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from vlmprune.errors import LayoutError, UnsupportedMethodError
from vlmprune.layout import VisualLayout, raster_layout, unknown_layout
from vlmprune.methods.batch import TowerFacts

from ..tower.encoded_visuals import EncodedVisuals
from .family import Family
from .wrappers import without_wrappers


class Llava(Family):
    """One tile an image, one raster of patch features, 1-D positions."""

    name: ClassVar[str] = "LLaVA"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
    has_equal_tiles: ClassVar[bool] = True

    @property
    def vision_tower(self) -> nn.Module:
        """The CLIP or SigLIP vision model."""
        return without_wrappers(self.multimodal_model.vision_tower)  # type: ignore[arg-type]

    @cached_property
    def _vision_layers(self) -> nn.ModuleList:
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        layers = getattr(getattr(tower, "encoder", None), "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise UnsupportedMethodError(
                f"The vision tower {type(self.vision_tower).__name__} has no `encoder.layers`; its attention cannot be read."
            )
        return layers

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `self_attn` of an encoder layer."""
        return self._vision_layers[layer].self_attn  # type: ignore[return-value]

    def vision_layer(self, layer: int) -> nn.Module:
        """Return an encoder layer."""
        return self._vision_layers[layer]

    @property
    def projector(self) -> nn.Module:
        """`multi_modal_projector`."""
        return self.multimodal_model.multi_modal_projector  # type: ignore[return-value]

    @property
    def has_tower_attention(self) -> bool:
        """True for towers with `encoder.layers`, as CLIP and SigLIP have them."""
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        return isinstance(getattr(getattr(tower, "encoder", None), "layers", None), nn.ModuleList)

    @property
    def vision_heads(self) -> int:
        """Number of attention heads of the vision tower."""
        return int(self.config.vision_config.num_attention_heads)

    @property
    def feature_layers(self) -> int | list[int]:
        """Indices of the hidden states that make the features, as in the configuration."""
        return self.config.vision_feature_layer

    @cached_property
    def state_layers(self) -> tuple[int, ...]:
        """The layers behind the hidden states of `feature_layers`; -1 stands for the embeddings before the first layer."""
        layers, chosen = int(self.config.vision_config.num_hidden_layers), self.feature_layers
        states = [chosen] if isinstance(chosen, int) else list(chosen)
        return tuple((state if state >= 0 else layers + 1 + state) - 1 for state in states)

    @cached_property
    def tower_facts(self) -> TowerFacts:
        """Facts of the tower; with several feature layers the deepest counts as the feature layer."""
        layers = int(self.config.vision_config.num_hidden_layers)
        deepest = max(self.state_layers)
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        has_cls = hasattr(getattr(tower, "embeddings", None), "class_embedding")
        return TowerFacts(layers, max(deepest, 0), has_cls, heads=self.vision_heads)

    @property
    def has_grid(self) -> bool:
        """True unless the CLS token stays among the features."""
        return not (self.tower_facts.has_cls and self.config.vision_feature_select_strategy == "full")

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image; of unknown geometry where the CLS token stays among the features."""
        return tuple(self._layout(count) for count in visuals.counts)

    def _layout(self, count: int) -> VisualLayout:
        side = round(count**0.5)
        return raster_layout(side, side) if side * side == count and self.has_grid else unknown_layout(count)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Drop the CLS column of `signal [tiles, tokens, heads]` where the features have none; one tile is one image."""
        tokens, counts = signal.shape[1], visuals.counts
        if len(set(counts)) != 1 or counts[0] not in (tokens, tokens - 1):
            raise LayoutError(
                f"The vision tower scored {tokens} tokens a tile, the images have {list(counts)} visual tokens."
            )
        return signal[:, tokens - counts[0] :].flatten(0, 1)
