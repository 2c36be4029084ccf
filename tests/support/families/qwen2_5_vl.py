"""A tiny Qwen2.5-VL: grouped queries, a head of its own, windows of 3 x 3 tokens that are cut at the borders."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from support.families.qwen_case import PATCH, TEXT, TOKENS, finish, qwen_case

_TEXT = {
    **TEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "window_size": 12,
    "fullatt_block_indexes": [0, 2],
    "tokens_per_second": 4,
}


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    config = Qwen2_5_VLConfig(text_config=dict(_TEXT), vision_config=dict(_VISION), **TOKENS)
    return finish(Qwen2_5_VLForConditionalGeneration(config), dtype)


QWEN2_5_VL = qwen_case("qwen2.5-vl", _build, seconds_per_grid=0.5)
CASES = (QWEN2_5_VL,)
