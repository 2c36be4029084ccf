"""Gemma 3: `Gemma3ForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout, raster_layout

from ..parts import Part
from ..tower.encoded_visuals import EncodedVisuals
from .facts import PictureKind, Preparation
from .family import Family
from .gemma_base import GemmaBase, image_blocks


class Gemma3(GemmaBase):
    """A SigLIP tower whose patches are averaged in square cells, and a decoder with sliding windows in most of its layers.

    An image is one tile. Crops (pan and scan) are images of their own, each between its own markers, for only the text
    between them says which belong together. The tokens of an image see each other both ways in every layer; a window counts
    the tokens that are left.
    """

    name: ClassVar[str] = "Gemma 3"
    model_classes: ClassVar[tuple[str, ...]] = ("Gemma3ForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[Preparation] = Preparation(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        picture="<start_of_image>",
        markers={
            "<start_of_image>": ("boi_token_index", "boi_token"),
            "<image_soft_token>": ("image_token_id", "image_token"),
            "<end_of_image>": ("eoi_token_index", "eoi_token"),
        },
    )
    picture_kind: ClassVar[PictureKind] = "one tile"
    parts: ClassVar[tuple[Part, ...]] = (*Family.parts, Part("multimodal_model", ("token_type_ids",)))
    tower_parts: ClassVar[tuple[Part, ...]] = (
        Part("vision_layers.*.self_attn.q_proj"),
        Part("vision_layers.*.self_attn.k_proj"),
        Part("projector.patches_per_image"),
        Part("projector.tokens_per_side"),
    )

    @property
    def projector(self) -> nn.Module:
        """Average pooling, a norm and a product; it is given all patches of a tile."""
        return self.multimodal_model.multi_modal_projector  # type: ignore[return-value]

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Patches along the side of a tile, and of the cell that becomes one visual token."""
        vision = self.config.vision_config
        patches, tokens = int(vision.image_size) // int(vision.patch_size), int(self.config.mm_tokens_per_image**0.5)
        return patches, patches // tokens

    def attention_blocks(self, inputs: Mapping[str, Any], columns: int, past: int) -> Tensor | None:
        """Return the images of each row by the token types, as the host numbers them; None where it got none."""
        types = inputs.get("token_type_ids")
        return None if types is None else image_blocks(types == 1, columns, past)

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a square raster per image."""
        patches, cell = self.sides
        layout = raster_layout(patches // cell, patches // cell)
        if any(count != layout.total for count in visuals.counts):
            raise LayoutError(f"The images have {list(visuals.counts)} visual tokens; a tile makes {layout.total}.")
        return (layout,) * len(visuals.counts)

    def token_counts(self, modality: str, features: Sequence[Tensor]) -> tuple[int, ...]:
        """Return the visual tokens of each tile."""
        return tuple(len(feature) for feature in features)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Average `signal [tiles, patches, channels]` over the cells that become one visual token each."""
        patches, cell = self.sides
        if signal.shape[1] != patches**2 or len(signal) != len(visuals.counts):
            raise LayoutError(
                f"The vision tower scored {list(signal.shape[:2])} patches; {len(visuals.counts)} images have {patches**2} each."
            )
        rows = patches // cell
        return signal.view(len(signal), rows, cell, rows, cell, -1).mean((2, 4)).flatten(0, 2)

    def project(self, features: Tensor) -> Tensor:
        """Turn rows `[rows, dim]` of the signal "features", averaged over cells already, into visual tokens."""
        projector: Any = self.projector
        weight = projector.mm_input_projection_weight
        device = features.device if weight.device.type == "meta" else weight.device
        projected: Tensor = projector.mm_soft_emb_norm(features.to(device, weight.dtype)) @ weight
        return projected.to(features.device)
