"""GLM-4.1V to GLM-4.6V: `Glm4vForConditionalGeneration`, `Glm46VForConditionalGeneration`, their mixture of experts."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from ..parts import Part
from ..tower.packed import ConvolvedTowerReader
from ..tower.reader import TowerReader
from .facts import Preparation
from .qwen_base import QwenVL

_MARKERS = {
    "<|image|>": ("image_token_id", "image_token"),
    "<|video|>": ("video_token_id", "video_token"),
    "<|begin_of_image|>": ("image_start_token_id", "image_start_token"),
    "<|end_of_image|>": ("image_end_token_id", "image_end_token"),
    "<|begin_of_video|>": ("video_start_token_id", "video_start_token"),
    "<|end_of_video|>": ("video_end_token_id", "video_end_token"),
}


class Glm4v(QwenVL):
    """Full attention in every layer of the tower; a convolution merges its patches, 2 x 2 at a time.

    The placeholders of videos are those of images, so the host takes images or videos in a call, not both. The frames of a video
    stand apart, each with the text of its time; all of them are one video.
    """

    name: ClassVar[str] = "GLM-4V"
    model_classes: ClassVar[tuple[str, ...]] = (
        "Glm4vForConditionalGeneration",
        "Glm46VForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
    )
    model_types: ClassVar[tuple[str, ...]] = ()
    text_positions: ClassVar[bool] = False
    preparation: ClassVar[Preparation] = Preparation(
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        "Glm4vVideoProcessor",
        "<|begin_of_image|><|image|><|end_of_image|>",
        _MARKERS,
    )
    tower_parts: ClassVar[tuple[Part, ...]] = (*QwenVL.tower_parts, Part("vision_tower.merger"))

    def placeholder_id(self, modality: str) -> int:
        """Return the id of the token that stands for one visual token: that of images."""
        return int(self.config.image_token_id)

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads the fused projection of packed sequences, and what the convolution gets."""
        return ConvolvedTowerReader()

    @property
    def projector(self) -> nn.Module:
        """The convolution over the patches of a token; the merger follows it."""
        return self.vision_tower.downsample  # type: ignore[return-value]

    def project(self, features: Tensor) -> Tensor:
        """Turn rows `[rows, patches_per_token * dim]` of the signal "features", of any dtype, into visual tokens."""
        tower: Any = self.vision_tower
        weight = tower.downsample.weight
        device: Any = features.device if weight.device.type == "meta" else weight.device
        side = int(tower.spatial_merge_size)
        patches = features.to(device, weight.dtype).unflatten(-1, (side, side, -1)).permute(0, 3, 1, 2)
        merged: Tensor = tower.merger(tower.downsample(patches).flatten(1))
        return merged.to(features.device)
