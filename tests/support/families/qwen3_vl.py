"""Tiny Qwen3-VL models, dense and mixture of experts: grouped queries, interleaved M-RoPE, three deepstack layers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from support.families.qwen_case import PATCH, TEXT, TOKENS, finish, qwen_case

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_TEXT = {**TEXT, "head_dim": 16, "rope_parameters": _ROPE}
_VISION = {
    "depth": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@lru_cache(maxsize=4)
def _dense(dtype: torch.dtype) -> Any:
    config = Qwen3VLConfig(text_config=dict(_TEXT), vision_config=dict(_VISION), **TOKENS)
    return finish(Qwen3VLForConditionalGeneration(config), dtype)


@lru_cache(maxsize=4)
def _mixture(dtype: torch.dtype) -> Any:
    config = Qwen3VLMoeConfig(text_config={**_TEXT, **_EXPERTS}, vision_config=dict(_VISION), **TOKENS)
    return finish(Qwen3VLMoeForConditionalGeneration(config), dtype)


QWEN3_VL = qwen_case("qwen3-vl", _dense, timestamps=True)
QWEN3_VL_MOE = qwen_case("qwen3-vl-moe", _mixture, timestamps=True)
CASES = (QWEN3_VL, QWEN3_VL_MOE)
