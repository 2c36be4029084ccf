"""Configurations of every model family, a few thousand weights each."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    VipLlavaConfig,
)

TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 8},
}
TEXT = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 4096},
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
QWEN_IDS = {
    **{"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93},
    "tie_word_embeddings": False,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PACKED = {
    **{"depth": 3, "num_heads": 2, "in_channels": 3, "patch_size": 4, "spatial_merge_size": 2},
    "temporal_patch_size": 2,
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small configuration of that model type."""
    return MAKERS[model_type]()


def _llava() -> PreTrainedConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TEXT, **SPECIAL), image_token_index=90
    )


def _vipllava() -> PreTrainedConfig:
    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, **SPECIAL),
        image_token_index=90,
        vision_feature_layers=[-2, -1, 1],
    )


def _llava_next() -> PreTrainedConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, **SPECIAL),
        image_token_index=90,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_next_video() -> PreTrainedConfig:
    return LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, **SPECIAL),
        image_token_index=90,
        video_token_index=91,
        image_grid_pinpoints=PINPOINTS,
    )


def _llava_onevision() -> PreTrainedConfig:
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **SPECIAL),
        image_token_index=90,
        video_token_index=91,
        image_grid_pinpoints=[[h, w] for h in (32, 64, 96, 128) for w in (32, 64, 96, 128)],
        vision_aspect_ratio="anyres_max_4",
    )


def _qwen2_vl() -> PreTrainedConfig:
    return Qwen2VLConfig(
        vision_config={**PACKED, "embed_dim": 24, "mlp_ratio": 2, "hidden_size": 32},
        text_config={**TEXT, **SPECIAL, "rope_parameters": _rope(1, 1, 2)},
        **QWEN_IDS,
    )


def _qwen2_5_vl() -> PreTrainedConfig:
    vision = {**PACKED, "hidden_size": 24, "intermediate_size": 36, "out_hidden_size": 32, "window_size": 16}
    return Qwen2_5_VLConfig(
        vision_config={**vision, "fullatt_block_indexes": [1]},
        text_config={**TEXT, **SPECIAL, "rope_parameters": _rope(1, 1, 2)},
        **QWEN_IDS,
    )


def _qwen3_vl(**text: int | list[int]) -> PreTrainedConfig:
    vision = {
        **PACKED,
        "hidden_size": 24,
        "intermediate_size": 36,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
    }
    return (Qwen3VLMoeConfig if text else Qwen3VLConfig)(
        vision_config={**vision, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, **SPECIAL, "head_dim": 16, **text, "rope_parameters": _rope(2, 3, 3)},
        **QWEN_IDS,
    )


def _qwen3_vl_moe() -> PreTrainedConfig:
    return _qwen3_vl(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1])


def _rope(*sections: int) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


MAKERS = {
    "llava": _llava,
    "vipllava": _vipllava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
}
