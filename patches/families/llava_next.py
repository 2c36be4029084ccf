"""LLaVA-NeXT: `LlavaNextForConditionalGeneration` with a CLIP or SigLIP tower."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..tower.encoded_visuals import EncodedVisuals
from .anyres import AnyresImage, anyres_image
from .anyres_family import AnyresFamily
from .facts import PictureKind, Preparation


class LlavaNext(AnyresFamily):
    """A thumbnail and two to four crops an image, stitched and unpadded, a newline after every row."""

    name: ClassVar[str] = "LLaVA-NeXT"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    preparation: ClassVar[Preparation] = Preparation("LlavaNextProcessor", "LlavaNextImageProcessor")
    picture_kind: ClassVar[PictureKind] = "tiles"

    def images(self, visuals: EncodedVisuals) -> tuple[AnyresImage, ...]:
        """Follow `image_sizes`."""
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        return tuple(
            anyres_image(size, pinpoints, vision.image_size, vision.patch_size)
            for size in torch.as_tensor(visuals.inputs["image_sizes"]).tolist()
        )
