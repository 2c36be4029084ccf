"""A tiny LLaVA-NeXT-Video: the images of the tiny LLaVA-NeXT, frames of 5 x 5 patches pooled to 2 x 2."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from support.families.anyres_case import PATCH, TILE, finish, size_of, tiled_pixels
from support.families.llava_next import CUTS, PINPOINTS, SIZES
from support.families.llava_onevision import VIDEO_TOKEN, OnevisionCase, is_video
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, TOWER, seeded_pixels

FRAMES = {"video small": 3, "video large": 8}


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=TILE, patch_size=PATCH, projection_dim=32).to_dict(),
        text_config=LLAMA_GQA.to_dict(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
    )
    return finish(LlavaNextVideoForConditionalGeneration(config), dtype, unused=[VIDEO_TOKEN])


def _image(name: str) -> dict[str, Tensor]:
    if is_video(name):
        return {"pixel_values_videos": seeded_pixels(name, FRAMES.get(name, 6), 3, TILE, TILE)}
    crops, _ = CUTS.get(name, CUTS["default"])
    return tiled_pixels(name, size_of(SIZES, name), 1 + crops, 5)


def _tokens(name: str) -> int:
    return 4 * FRAMES.get(name, 6) if is_video(name) else CUTS.get(name, CUTS["default"])[1]


LLAVA_NEXT_VIDEO = OnevisionCase("llava-next-video", _build, _image, _tokens)
CASES = (LLAVA_NEXT_VIDEO,)
