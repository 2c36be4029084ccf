"""A tiny ViP-LLaVA: three layers of a CLIP tower side by side are the features."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from support.families.anyres_case import finish
from support.tiny_models import CLIP, IMAGE_TOKEN, LLAMA_GQA, FamilyCase, seeded_pixels


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    config = VipLlavaConfig(
        vision_config=CLIP.to_dict(),
        text_config=LLAMA_GQA.to_dict(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-2, -3, 1],
    )
    return finish(VipLlavaForConditionalGeneration(config), dtype)


VIP_LLAVA = FamilyCase("vip-llava", _build, lambda name: {"pixel_values": seeded_pixels(name, 3, 24, 24)}, lambda _: 36)
CASES = (VIP_LLAVA,)
