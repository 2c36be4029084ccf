"""Folders of tiny random models with their processors, of sizes that vLLM runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from support.families.real_processors import onevision_processor, qwen_processor
from support.tiny_models import spread_weights

# The attention of vLLM for CPUs knows heads of 32 channels and more.
_HIDDEN = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_TOKENS = {"image_token_id": 119, "video_token_id": 118, "vision_start_token_id": 117, "vision_end_token_id": 116}
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}


def _qwen2_vl() -> tuple[Any, Any, str]:
    config = transformers.Qwen2VLConfig(
        text_config={**_HIDDEN, "rope_parameters": _mrope([4, 6, 6])},
        vision_config={
            "depth": 3,
            "embed_dim": 64,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        **_TOKENS,
    )
    return transformers.Qwen2VLForConditionalGeneration(config), qwen_processor("Qwen2VLProcessor"), _QWEN_PICTURE


def _qwen3_vl() -> tuple[Any, Any, str]:
    config = transformers.Qwen3VLConfig(
        text_config={**_HIDDEN, "head_dim": 32, "rope_parameters": _mrope([6, 5, 5], mrope_interleaved=True)},
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        tie_word_embeddings=False,
        **_TOKENS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config), qwen_processor("Qwen3VLProcessor"), _QWEN_PICTURE


def _llava_onevision() -> tuple[Any, Any, str]:
    processor = onevision_processor()
    # The one that vLLM knows.
    processor.vision_aspect_ratio = "anyres_max_9"
    side = processor.image_processor.size["height"]
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": side // round(processor.num_image_tokens**0.5),
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **_HIDDEN},
        image_token_id=119,
        video_token_id=processor.tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor, "<image>"


RANDOM_MODELS: dict[str, Callable[[], tuple[Any, Any, str]]] = {
    "qwen2-vl": _qwen2_vl,
    "qwen3-vl": _qwen3_vl,
    "llava-onevision": _llava_onevision,
}


def write_random_model(name: str, folder: Path) -> Path:
    """Write a model and its processor; prompts in its chat format show pictures before the text."""
    torch.manual_seed(0)
    model, processor, picture = RANDOM_MODELS[name]()
    model = spread_weights(model).eval()
    with torch.no_grad():
        # Markers of pictures are never the answer.
        model.lm_head.weight[110:] = 0
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.chat_template = _CHAT.replace("PICTURE", picture)
    processor.tokenizer.chat_template = processor.chat_template
    processor.save_pretrained(folder)
    return folder
