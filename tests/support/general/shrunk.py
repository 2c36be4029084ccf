"""The smallest configuration of a class of transformers, made from its own defaults."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

VOCABULARY = 200
FIRST_SPECIAL = 150

_WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "embed_dim", "out_hidden_size", "width", "n_embd"), 32),
    **dict.fromkeys(("mm_hidden_size", "projection_dim", "projector_hidden_size", "output_dim", "model_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "mlp_dim", "moe_intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("projector_intermediate_size", "connector_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "n_head", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "n_layer", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "adapter_output_size"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_selected_experts", "top_k_experts"), 2),
}
_FIXED = {
    "vocab_size": VOCABULARY,
    "image_size": 32,
    "patch_size": 8,
    "max_position_embeddings": 2048,
    "sliding_window": 16,
}


def shrunk_config(cls: type, **changes: Any) -> PreTrainedConfig:
    """Return a configuration of a model class, its widths and depths small, its special tokens inside a small vocabulary.

    Args:
        cls: a model class of transformers.
        changes: values of single keys by `part.key`, `text_config.num_hidden_layers` say; None takes a key away.
    """
    config_class = cls.config_class
    values = config_class().to_dict()
    vision = config_class.sub_configs.get("vision_config")
    if values.get("vision_config", 0) is None and vision is not None and vision is not transformers.AutoConfig:
        values["vision_config"] = vision().to_dict()
    ids: dict[int, int] = {}
    shrunk = _shrunk(values, "", ids)
    for path, value in changes.items():
        target = shrunk
        *parts, key = path.split(".")
        for part in parts:
            target = target.setdefault(part, {})
        if value is None:
            target.pop(key, None)
        else:
            target[key] = value
    return config_class(**shrunk)


def _shrunk(values: dict[str, Any], path: str, ids: dict[int, int]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    depth = min((int(values[k]) for k in ("num_hidden_layers", "depth", "num_layers") if values.get(k)), default=4)
    depth = min(depth, 4)
    for key, value in values.items():
        if key in ("transformers_version", "_name_or_path", "architectures", "per_layer_config"):
            continue
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            result[key] = _shrunk(value, f"{path}{key}.", ids)
        elif (key.endswith(("_token_id", "_token_index")) or key in ("image_token", "video_token")) and isinstance(
            value, int
        ):
            result[key] = value if value < 10 else ids.setdefault(value, FIRST_SPECIAL + len(ids))
        elif key.endswith("_token_id") and isinstance(value, list):
            result[key] = [v if v < 10 else ids.setdefault(v, FIRST_SPECIAL + len(ids)) for v in value]
        elif key in _WIDTHS and isinstance(value, int) and not isinstance(value, bool) and value:
            result[key] = min(value, _WIDTHS[key]) if "num" in key or "layers" in key else _WIDTHS[key]
        elif key in _FIXED and isinstance(value, int) and not isinstance(value, bool):
            result[key] = _FIXED[key]
        elif key in (
            "layer_types",
            "mlp_layer_types",
            "no_rope_layers",
            "indexer_types",
            "kv_source_layers",
        ) and isinstance(value, list):
            result[key] = _spread(value, depth)
        elif isinstance(value, dict) and "mrope_section" in value:
            result[key] = {**value, "mrope_section": [1, 1, 2]}
        else:
            result[key] = value
    return result


def _spread(items: list[Any], count: int) -> list[Any]:
    """Return `count` items in which every kind appears, where there is room."""
    if len(items) <= count:
        return items
    kinds = list(dict.fromkeys(items))
    head = items[: max(0, count - len(kinds))]
    return [*head, *kinds][-count:]


def model_class(name: str) -> type | None:
    """Return a class of transformers, or None where this version has none of that name."""
    return getattr(transformers, name, None)
