"""LLaVA-OneVision: `LlavaOnevisionForConditionalGeneration`, images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vlmprune.layout import VisualLayout, raster_layout

from ..tower.encoded_visuals import EncodedVisuals
from .anyres import AnyresImage, anyres_image
from .anyres_family import AnyresFamily, check_counts
from .facts import PictureKind, Preparation


class LlavaOnevision(AnyresFamily):
    """A thumbnail and up to 36 crops an image, interpolated where they are many; frames of videos pooled 2 x 2.

    Where a prompt shows several images, each of them is one tile and a newline. A video ends with a newline.
    """

    name: ClassVar[str] = "LLaVA-OneVision"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaOnevisionForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    preparation: ClassVar[Preparation] = Preparation(
        "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", "LlavaOnevisionVideoProcessor"
    )
    picture_kind: ClassVar[PictureKind] = "tiles of single pictures"
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    @property
    def frame_side(self) -> int:
        """Tokens along the side of a pooled video frame."""
        return -(-self.tile_side // 2)

    def token_counts(self, modality: str, features: Sequence[Tensor]) -> tuple[int, ...]:
        """Count a video's newline also where the host adds it later (transformers 5.17)."""
        counts = super().token_counts(modality, features)
        if modality == "video":
            return tuple(count // self.frame_side**2 * self.frame_side**2 + 1 for count in counts)
        return counts

    def images(self, visuals: EncodedVisuals) -> tuple[AnyresImage, ...]:
        """Follow `image_sizes`, and `batch_num_images`: an image is cut only where its prompt shows no other."""
        inputs, vision, pinpoints = visuals.inputs, self.config.vision_config, self.config.image_grid_pinpoints
        sizes, per_prompt = torch.as_tensor(inputs["image_sizes"]).tolist(), inputs.get("batch_num_images")
        cut = [True] * len(sizes)
        if per_prompt is not None:
            cut = [number == 1 for number in torch.as_tensor(per_prompt).tolist() for _ in range(number)]
        aspect = inputs.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        max_crops = int(aspect.removeprefix("anyres_max_"))
        return tuple(
            anyres_image(size, pinpoints, vision.image_size, vision.patch_size, max_crops)
            if is_cut
            else AnyresImage(self.tile_side)
            for size, is_cut in zip(sizes, cut, strict=False)
        )

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return the layout of each encoded image or video.

        Raises:
            LayoutError: the host packed another number of tokens.
        """
        if visuals.modality == "image":
            return super().layouts(visuals)
        frames = [(count - 1) // self.frame_side**2 for count in visuals.counts]
        layouts = tuple(video_layout(number, self.frame_side) for number in frames)
        check_counts(visuals, layouts)
        return layouts

    def tile_counts(self, visuals: EncodedVisuals) -> tuple[int, ...]:
        """Return the tiles of each image, or the frames of each video."""
        if visuals.modality == "image":
            return super().tile_counts(visuals)
        return tuple((count - 1) // self.frame_side**2 for count in visuals.counts)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Bring `signal [tiles, tokens, heads]` in the order of the visual tokens, interpolated where the features are."""
        if visuals.modality == "image":
            return super().token_vision(signal, visuals, layouts)
        planes = self.patch_maps(signal).unflatten(1, (self.tile_side, self.tile_side)).movedim(-1, 1)
        pooled = interpolate(planes, (self.frame_side, self.frame_side), mode="bilinear").flatten(2).transpose(1, 2)
        frames_and_newline = pooled.unflatten(0, (len(visuals.counts), -1)).flatten(1, 2)
        return pad(frames_and_newline, (0, 0, 0, 1)).flatten(0, 1)


@lru_cache(maxsize=64)
def video_layout(frames: int, side: int) -> VisualLayout:
    """Return the layout of a video: `frames` rasters of `side` x `side` tokens, and a newline that belongs to the last frame."""
    raster = raster_layout(side, side, frames)
    return replace(
        raster,
        tile=pad(raster.tile, (0, 1)),
        row=pad(raster.row, (0, 1), value=-1),
        column=pad(raster.column, (0, 1), value=-1),
        stitched_row=pad(raster.stitched_row, (0, 1), value=-1),
        stitched_column=pad(raster.stitched_column, (0, 1), value=-1),
        newline=pad(raster.newline, (0, 1), value=True),
        frame=pad(raster.frame, (0, 1), value=frames - 1),
        grid=None,
    )
