"""A tiny PaddleOCR-VL: patches row by row, grouped queries, 3-D positions."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

from support.families.qwen_case import PATCH, TEXT, TOKENS, QwenCase, finish, merged_tokens, patch_grid
from support.tiny_models import seeded_pixels

_TEXT = {
    **{key: value for key, value in TEXT.items() if key != "bos_token_id"},
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
_VISION = {
    **{"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24},
    **{"patch_size": PATCH, "image_size": 8 * PATCH, "spatial_merge_size": 2},
}


def _patches(name: str) -> dict[str, Tensor]:
    grid = patch_grid(name)
    pixels = seeded_pixels(name, math.prod(grid), 3, PATCH, PATCH)[0]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    config = PaddleOCRVLConfig(
        text_config=dict(_TEXT), vision_config=dict(_VISION), tie_word_embeddings=False, **TOKENS
    )
    return finish(PaddleOCRVLForConditionalGeneration(config), dtype)


PADDLEOCR_VL = QwenCase("paddleocr-vl", _build, _patches, merged_tokens)
CASES = (PADDLEOCR_VL,)
