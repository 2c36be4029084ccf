"""LLaVA-1.5: `LlavaForConditionalGeneration` with any CLIP or SigLIP tower and any decoder-only language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.errors import LayoutError, UnsupportedFamilyError
from vlmprune.layout import VisualLayout, raster_layout, unknown_layout

from ..parts import Part, missing_parts
from ..tower.encoded_visuals import EncodedVisuals
from .encoder_tower import EncoderTower
from .facts import Preparation, drops_cls, state_layers

BLOCK_PARTS = tuple(
    Part(f"vision_layers.*.{name}")
    for name in ("layer_norm1", "self_attn.k_proj", "self_attn.q_proj", "self_attn.out_proj", "layer_norm2", "mlp")
)
"""What reducing tokens in a block of the vision tower relies on."""


class Llava(EncoderTower):
    """One tile an image, one raster of patch features, 1-D positions."""

    name: ClassVar[str] = "LLaVA"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    preparation: ClassVar[Preparation] = Preparation("LlavaProcessor", "CLIPImageProcessor")
    tower_parts: ClassVar[tuple[Part, ...]] = (
        Part("vision_layers.*.self_attn.q_proj"),
        Part("vision_layers.*.self_attn.k_proj"),
        Part("projector"),
    )
    has_equal_tiles: ClassVar[bool] = True

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
    def has_tower_blocks(self) -> bool:
        """True for these towers, whose blocks are alike."""
        return self.has_tower_attention and not missing_parts(self, BLOCK_PARTS)

    @property
    def has_free_order(self) -> bool:
        """True where these towers give their patches alone to the projector."""
        return self.has_tower_blocks and self.has_grid

    @property
    def has_projector(self) -> bool:
        """True for these towers too: the projector of others may get the patches of several images in one row."""
        return self.has_tower_attention

    @cached_property
    def state_layers(self) -> tuple[int, ...]:
        """The layers behind the hidden states that make the features; -1 stands for the embeddings before the first layer."""
        return state_layers(self.config)

    def changed_features(self, inputs: Mapping[str, Any]) -> str | None:
        """Return `vision_feature_layer` (or the plural, its older name) with its value if it is not the configured one."""
        for name in ("vision_feature_layer", "vision_feature_layers"):
            chosen = inputs.get(name)
            if chosen is not None and state_layers(self.config, chosen) != self.state_layers:
                return f"{name}={chosen}"
        return None

    def check(self) -> None:
        """Check the parts, and that the tower has a CLS token where its configuration says so.

        Raises:
            UnsupportedFamilyError: names what the model lacks.
        """
        super().check()
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        embeddings = getattr(tower, "embeddings", None)
        if hasattr(embeddings, "class_embedding") != self.tower_facts.has_cls:
            says = "a" if self.tower_facts.has_cls else "no"
            raise UnsupportedFamilyError(
                f"By its configuration the vision tower {type(tower).__name__} has {says} CLS token; "
                "`embeddings.class_embedding` says otherwise."
            )

    @property
    def has_grid(self) -> bool:
        """True unless the CLS token stays among the features."""
        return drops_cls(self.config) or not self.tower_facts.has_cls

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image; of unknown geometry where the CLS token stays among the features."""
        if not self.has_tower_attention:
            return tuple(unknown_layout(count) for count in visuals.counts)
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
