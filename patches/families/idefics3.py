"""Idefics3 and SmolVLM: `Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import TowerFacts

from ..calls import PIXELS
from ..tower.encoded_visuals import EncodedVisuals
from .facts import Preparation
from .shuffled_tiles import ShuffledTiles
from .wrappers import without_wrappers


class Idefics3(ShuffledTiles):
    """Tiles with text that tells row and column before each, the whole picture last; frames of SmolVLM's videos are tiles too.

    The host gives the features of all tiles of a row of the batch as one; here each tile is one.
    """

    name: ClassVar[str] = "Idefics3"
    model_classes: ClassVar[tuple[str, ...]] = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    model_types: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[Preparation] = Preparation("Idefics3Processor", "Idefics3ImageProcessor")
    language_path: ClassVar[str] = "text_model"

    @property
    def vision_tower(self) -> nn.Module:
        """`vision_model`."""
        return without_wrappers(self.multimodal_model.vision_model)  # type: ignore[arg-type]

    @property
    def projector(self) -> nn.Module:
        """What the connector does behind the shuffle of pixels."""
        return self.multimodal_model.connector.modality_projection  # type: ignore[union-attr, return-value]

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Return the facts of the tower: the last layer gives the features, and there is no CLS token."""
        vision = config.vision_config
        layers, heads = int(vision.num_hidden_layers), int(vision.num_attention_heads)
        return TowerFacts(layers, layers - 1, has_cls=False, heads=heads, patches_per_token=config.scale_factor**2)

    @property
    def cell_side(self) -> int:
        """`scale_factor`."""
        return int(self.config.scale_factor)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The last layer."""
        return (self.tower_facts.feature_layer,)

    def changed_features(self, inputs: Mapping[str, Any]) -> str | None:
        """Return None: nothing chooses other layers."""
        return None

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of a tile."""
        vision = self.config.vision_config
        return (int(vision.image_size) // int(vision.patch_size) // self.cell_side) ** 2

    def feature_items(self, modality: str, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the features of each tile, given those of each row of the batch."""
        return [tile for row in features for tile in row.split(self.tile_tokens) if len(tile)]

    def check_encoding(self, modality: str, inputs: Mapping[str, Any]) -> None:
        """Check that tiles are of the configured size, by which the tokens of a row are told apart.

        Raises:
            LayoutError: they are of another size.
        """
        pixels, side = inputs.get(PIXELS[modality]), int(self.config.vision_config.image_size)
        if isinstance(pixels, Tensor) and pixels.shape[-2:] != (side, side):
            raise LayoutError(
                f"{PIXELS[modality]} holds tiles of {list(pixels.shape[-2:])} pixels; allowed: [{side}, {side}], the "
                "`image_size` of the vision tower, which the processor's `max_image_size` must be."
            )

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Average each cell of `signal [tiles, tokens, channels]`.

        Raises:
            LayoutError: parts of a tile are masked.
        """
        mask = visuals.inputs.get("pixel_attention_mask")
        if isinstance(mask, Tensor):
            ones = mask.flatten(2).bool()
            if bool((ones.any(-1) & ~ones.all(-1)).any()):
                raise LayoutError(
                    "pixel_attention_mask hides parts of a tile, and attention to them is not told apart; allowed: tiles that "
                    "are shown whole or not at all, or a method that reads no attention of the vision tower."
                )
        return super().token_vision(signal, visuals, layouts)
