"""LLaVA-NeXT-Video: `LlavaNextVideoForConditionalGeneration`, images and videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool2d

from vlmprune.layout import VisualLayout, raster_layout

from ..tower.encoded_visuals import EncodedVisuals
from .anyres_family import check_counts
from .facts import Preparation
from .llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """Images as in LLaVA-NeXT; frames of videos pooled before the projector, one raster after the other, without newlines."""

    name: ClassVar[str] = "LLaVA-NeXT-Video"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaNextVideoForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    preparation: ClassVar[Preparation] = Preparation(
        "LlavaNextVideoProcessor", "LlavaNextImageProcessor", "LlavaNextVideoVideoProcessor"
    )
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    @property
    def pool_stride(self) -> int:
        """Patches along the side of what becomes one token of a frame."""
        return int(self.config.spatial_pool_stride)

    @property
    def frame_side(self) -> int:
        """Tokens along the side of a pooled video frame."""
        return self.tile_side // self.pool_stride

    def token_counts(self, modality: str, features: Sequence[Tensor]) -> tuple[int, ...]:
        """Count the tokens of all frames, whether the host gives them apart or in one row."""
        return tuple(math.prod(feature.shape[:-1]) for feature in features)

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return the layout of each encoded image or video.

        Raises:
            LayoutError: the host packed another number of tokens.
        """
        if visuals.modality == "image":
            return super().layouts(visuals)
        layouts = tuple(raster_layout(self.frame_side, self.frame_side, frames) for frames in self.tile_counts(visuals))
        check_counts(visuals, layouts)
        return layouts

    def tile_counts(self, visuals: EncodedVisuals) -> tuple[int, ...]:
        """Return the tiles of each image, or the frames of each video."""
        if visuals.modality == "image":
            return super().tile_counts(visuals)
        return tuple(count // self.frame_side**2 for count in visuals.counts)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Bring `signal [tiles, tokens, channels]` in the order of the visual tokens; in frames the mean of what is pooled.

        What the projector gets of a frame is pooled already.
        """
        if visuals.modality == "image":
            return super().token_vision(signal, visuals, layouts)
        if signal.shape[1] != self.frame_side**2:
            planes = self.patch_maps(signal).unflatten(1, (self.tile_side, self.tile_side)).movedim(-1, 1)
            signal = avg_pool2d(planes, self.pool_stride).flatten(2).transpose(1, 2)
        return signal.flatten(0, 1)
