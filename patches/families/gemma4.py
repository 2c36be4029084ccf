"""Gemma 4: `Gemma4ForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout, raster_layout

from ..calls import PIXELS
from ..parts import Part
from ..tower.encoded_visuals import EncodedVisuals
from ..tower.positioned import PositionedTowerReader
from ..tower.reader import TowerReader
from .facts import PictureKind, Preparation
from .family import Family
from .gemma_base import GemmaBase, image_blocks


class Gemma4(GemmaBase):
    """A tower over pictures of any size, padded to one length and averaged in cells; a decoder with windows and shared keys.

    The processor says where each patch lies; a cell of 3 x 3 patches is one visual token. Where the decoder is configured so,
    the tokens of a picture see each other both ways in sliding layers. Arguments by layer and token (`per_layer_inputs`)
    follow the tokens that are left. Each frame of a video stands apart in the prompt; all of them are one video.
    """

    name: ClassVar[str] = "Gemma 4"
    model_classes: ClassVar[tuple[str, ...]] = ("Gemma4ForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[Preparation] = Preparation(
        "Gemma4Processor",
        "Gemma4ImageProcessor",
        "Gemma4VideoProcessor",
        picture="<|image|>",
        markers={"<|image|>": ("image_token_id", "image_token"), "<|video|>": ("video_token_id", "video_token")},
    )
    picture_kind: ClassVar[PictureKind] = "grids"
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    parts: ClassVar[tuple[Part, ...]] = (
        *Family.parts,
        Part("multimodal_model", ("mm_token_type_ids",)),
        Part("multimodal_model.get_image_features", (PIXELS["image"], "image_position_ids")),
        Part("multimodal_model.get_video_features", (PIXELS["video"], "video_position_ids")),
    )
    tower_parts: ClassVar[tuple[Part, ...]] = (
        Part("vision_tower", ("pixel_position_ids",)),
        Part("vision_layers.*.self_attn", ("position_embeddings", "attention_mask")),
        *(Part(f"vision_layers.*.self_attn.{name}") for name in ("q_proj", "k_proj", "q_norm", "k_norm", "head_dim")),
        Part("projector"),
    )

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads padded pictures whose patches carry their places."""
        return PositionedTowerReader(int(self.config.vision_config.pooling_kernel_size))

    @property
    def projector(self) -> nn.Module:
        """`embed_vision`: a norm and a product."""
        return self.multimodal_model.embed_vision  # type: ignore[return-value]

    def attention_blocks(self, inputs: Mapping[str, Any], columns: int, past: int) -> Tensor | None:
        """Return the pictures of each row by the token types, as the host numbers them; None where they are plainly causal."""
        types = inputs.get("mm_token_type_ids")
        if types is None or self.config.get_text_config().use_bidirectional_attention != "vision":
            return None
        return image_blocks((types == 1) | (types == 2), columns, past)

    def check_encoding(self, modality: str, inputs: Mapping[str, Any]) -> None:
        """Check the places of the patches.

        Raises:
            LayoutError: there are none, or a picture's patches are no whole cells in a raster.
        """
        name = f"{modality}_position_ids"
        places = inputs.get(name)
        if not isinstance(places, Tensor) or places.ndim != 3 or places.shape[2] != 2:
            shape = list(places.shape) if isinstance(places, Tensor) else places
            raise LayoutError(
                f"{PIXELS[modality]} came with {name}={shape}; needed: the processor's tensor [pictures, patches, 2]."
            )
        cell = int(self.config.vision_config.pooling_kernel_size)
        for number, (rows, columns, patches) in enumerate(_grids(places)):
            if patches != rows * columns or rows % cell or columns % cell or not patches:
                raise LayoutError(
                    f"Picture {number} has {patches} patches in {rows} rows and {columns} columns by {name}; allowed: a whole "
                    f"raster, rows and columns in multiples of {cell}."
                )

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image; for a video the rasters of its frames.

        Raises:
            LayoutError: the frames of a video differ, or give another number of tokens than was encoded.
        """
        cell = int(self.config.vision_config.pooling_kernel_size)
        grids = [(rows // cell, columns // cell) for rows, columns, _ in _grids(visuals.inputs[_places(visuals)])]
        layouts = []
        for frames in self.tile_counts(visuals):
            own, grids = grids[:frames], grids[frames:]
            if len(set(own)) != 1:
                raise LayoutError(f"The frames of a video have {own} visual tokens; allowed: one size in a video.")
            layouts.append(raster_layout(*own[0], frames))
        if tuple(layout.total for layout in layouts) != visuals.counts:
            raise LayoutError(
                f"{_places(visuals)} stands for {[layout.total for layout in layouts]} visual tokens, the vision tower made "
                f"{list(visuals.counts)}."
            )
        return tuple(layouts)

    def tile_counts(self, visuals: EncodedVisuals) -> tuple[int, ...]:
        """Return 1 for each image, and the frames of each video."""
        frames = visuals.inputs.get("num_frames_per_video") if visuals.modality == "video" else None
        return (1,) * len(visuals.counts) if frames is None else tuple(frames.tolist())

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Return `signal [visual tokens, channels]` as it is: the reader has averaged cells already."""
        if len(signal) != sum(visuals.counts):
            raise LayoutError(
                f"The vision tower scored {len(signal)} tokens, the features have {list(visuals.counts)} visual tokens."
            )
        return signal


def _places(visuals: EncodedVisuals) -> str:
    return f"{visuals.modality}_position_ids"


def _grids(places: Tensor) -> list[tuple[int, int, int]]:
    """Return rows, columns and patches of each picture by its patches' places `[pictures, patches, 2]`, (x, y), -1 at padding."""
    highest = (places.amax(1) + 1).tolist()
    counts = (places != -1).all(-1).sum(1).tolist()
    return [(rows, columns, patches) for (columns, rows), patches in zip(highest, counts, strict=True)]
