"""Gemma 3: `Gemma3ForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout, raster_layout
from vlmprune.methods.batch import TowerFacts

from ..parts import Part
from ..tower.encoded_visuals import EncodedVisuals
from .decoder import decoder_gap
from .facts import PictureKind, Preparation
from .family import Family
from .wrappers import without_wrappers


class Gemma3(Family):
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

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Facts of the SigLIP tower: the last layer gives the features."""
        vision = config.vision_config
        depth = int(vision.num_hidden_layers)
        return TowerFacts(depth, depth - 1, has_cls=False, heads=int(vision.num_attention_heads))

    @property
    def vision_tower(self) -> nn.Module:
        """The SigLIP vision model."""
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

    @property
    def has_grid(self) -> bool:
        """Every image is one square raster."""
        return True

    @cached_property
    def decoder_gap(self) -> str | None:
        """Why tokens cannot be dropped between decoder layers: most of them attend in windows."""
        return decoder_gap(self.language_model, range(self.decoder_layers))

    @property
    def has_first_layer(self) -> bool:
        """Whether the first decoder layer attends to all tokens before; it has a window in the published models."""
        return super().has_first_layer and decoder_gap(self.language_model, range(1)) is None

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


def image_blocks(seen: Tensor, columns: int, past: int) -> Tensor:
    """Return the numbers of unbroken runs of image tokens, int64 `[batch, columns]`, -1 elsewhere.

    Args:
        seen: bool `[batch, tokens]`, the image tokens of the whole sequence from its first on, as hosts read it; behind its end
            there are none.
        columns: tokens per row of the call.
        past: tokens before it.
    """
    own = torch.nn.functional.pad(
        seen[:, past : past + columns], (0, max(0, past + columns - max(past, seen.shape[1])))
    )
    before = torch.nn.functional.pad(own, (1, -1))
    return ((own & ~before).cumsum(1) - 1).masked_fill(~own, -1)
