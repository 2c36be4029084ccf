"""A tiny LLaVA-NeXT: a CLIP tower of 5 x 5 patches, grouped queries; the default image is wide and padded."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from support.families.anyres_case import PATCH, TILE, finish, size_of, tiled_pixels
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, TOWER, FamilyCase

PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
SIZES = {"default": (13, 40), "small": (37, 11), "large": (40, 36), "square": (40, 40)}
# Crops and visual tokens, counted by hand: 25 of the thumbnail, and the rows that are no padding with a newline each.
CUTS = {
    "default": (2, 25 + 3 * 11),
    "small": (2, 25 + 10 * 4),
    "large": (4, 25 + 10 * 11),
    "square": (4, 25 + 10 * 11),
}


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=TILE, patch_size=PATCH, projection_dim=32).to_dict(),
        text_config=LLAMA_GQA.to_dict(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )
    return finish(LlavaNextForConditionalGeneration(config), dtype)


def _image(name: str) -> dict[str, Tensor]:
    crops, _ = CUTS.get(name, CUTS["default"])
    return tiled_pixels(name, size_of(SIZES, name), 1 + crops, 5)


LLAVA_NEXT = FamilyCase("llava-next", _build, _image, lambda name: CUTS.get(name, CUTS["default"])[1])
CASES = (LLAVA_NEXT,)
