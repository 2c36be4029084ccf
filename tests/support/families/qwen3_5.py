"""Tiny Qwen3.5 models, dense and mixture of experts: three layers of linear attention, one of full attention with gates."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from support.families.qwen_case import PATCH, TEXT, TOKENS, finish, qwen_case

_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
    "partial_rotary_factor": 0.5,
}
_TEXT = {
    **TEXT,
    "head_dim": 32,
    "rope_parameters": _ROPE,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    # With these a norm of nearly nothing does not blow up what a row in a batch is rounded otherwise than alone.
    "rms_norm_eps": 0.3,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "num_position_embeddings": 64,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


@lru_cache(maxsize=4)
def _dense(dtype: torch.dtype) -> Any:
    config = Qwen3_5Config(text_config=dict(_TEXT), vision_config=dict(_VISION), **TOKENS)
    return finish(Qwen3_5ForConditionalGeneration(config), dtype)


@lru_cache(maxsize=4)
def _mixture(dtype: torch.dtype) -> Any:
    config = Qwen3_5MoeConfig(text_config={**_TEXT, **_EXPERTS}, vision_config=dict(_VISION), **TOKENS)
    return finish(Qwen3_5MoeForConditionalGeneration(config), dtype)


QWEN3_5 = qwen_case("qwen3.5", _dense, timestamps=True)
QWEN3_5_MOE = qwen_case("qwen3.5-moe", _mixture, timestamps=True)
CASES = (QWEN3_5, QWEN3_5_MOE)
