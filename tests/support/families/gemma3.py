"""A tiny Gemma 3: cells of 2 x 2 patches, sliding and full layers, a window shorter than an image."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from support.families.anyres_case import finish
from support.families.gemma_case import BEGIN, END, TEXT, GemmaCase
from support.tiny_models import IMAGE_TOKEN, TOWER, seeded_pixels

SIDE, PATCH, TOKENS = 24, 2, 36
_TEXT = {
    **TEXT,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    config = Gemma3Config(
        text_config=dict(_TEXT),
        vision_config={**TOWER, "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False},
        mm_tokens_per_image=TOKENS,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )
    return finish(Gemma3ForConditionalGeneration(config), dtype)


GEMMA3 = GemmaCase(
    "gemma3", _build, lambda name: {"pixel_values": seeded_pixels(name, 3, SIDE, SIDE)}, lambda name: TOKENS
)
CASES = (GEMMA3,)
