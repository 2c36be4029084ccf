"""A tiny Qwen2-VL: as many key heads as query heads, tied embeddings, full attention in the tower."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from support.families.qwen_case import PATCH, TEXT, TOKENS, finish, qwen_case

_TEXT = {
    **TEXT,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    config = Qwen2VLConfig(text_config=dict(_TEXT), vision_config=dict(_VISION), tie_word_embeddings=True, **TOKENS)
    return finish(Qwen2VLForConditionalGeneration(config), dtype)


QWEN2_VL = qwen_case("qwen2-vl", _build)
CASES = (QWEN2_VL,)
