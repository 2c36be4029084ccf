"""What some classes need beside their own defaults shrunk: values by class and `part.key`; None takes a key away."""

from __future__ import annotations

from typing import Any

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_PARTIAL = {**_MROPE, "partial_rotary_factor": 0.5}

CHANGES: dict[str, dict[str, Any]] = {
    "AriaForConditionalGeneration": {"projector_patch_to_query_dict": {"16": 8}, "image_token_index": 160},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 4}},
    "CohereCompassForConditionalGeneration": {
        "text_config.rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}
    },
    "DeepseekOcr2ForConditionalGeneration": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "Dots3NoteForConditionalGeneration": {"text_config.num_key_value_heads": 4},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 4}},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4},
    "Gemma3nForConditionalGeneration": {
        **{"text_config.intermediate_size": 48, "text_config.activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0]},
        **{"text_config.num_kv_shared_layers": 0, "text_config.vocab_size_per_layer_input": 200},
    },
    "Gemma4ForConditionalGeneration": {
        **{"text_config.vocab_size_per_layer_input": 200, "vision_config.position_embedding_size": 64},
        "text_config.hidden_size_per_layer_input": 8,
    },
    "GraniteDoclingForConditionalGeneration": {"vision_config.image_size": 64},
    "Glm46VForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Glm4vForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Glm4vMoeForConditionalGeneration": {"text_config.rope_parameters": _PARTIAL, "text_config.head_dim": 16},
    "Glm5NextForConditionalGeneration": {
        **{"text_config.num_key_value_heads": 4, "text_config.linear_head_dim": 8, "text_config.linear_num_heads": 2},
    },
    "GlmOcrForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "GotOcr2ForConditionalGeneration": {"vision_config.image_size": 128},
    "HunYuanVLForConditionalGeneration": {
        "text_config.head_dim": 8,
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "xdrope_section": [1, 1, 1, 1]},
    },
    "InklingForConditionalGeneration": {"vision_config.n_layers": 2, "vision_config.text_hidden_size": 32},
    "JanusForConditionalGeneration": {
        **{"vq_config.base_channels": 32, "vq_config.latent_channels": 32, "vq_config.num_embeddings": 64},
        **{"vq_config.image_token_embed_dim": 32, "vq_config.num_res_blocks": 1},
    },
    "Kimi_K25ForConditionalGeneration": {
        "vision_config.pos_emb_height": 16,
        "vision_config.pos_emb_width": 16,
        "projection_hidden_size": 32,
        **{"text_config.num_key_value_heads": 4, "text_config.n_group": 1, "text_config.topk_group": 1},
    },
    "Llama4ForConditionalGeneration": {
        **{"vision_config.vision_output_dim": 32, "vision_config.projector_output_dim": 32},
        **{"vision_config.projector_input_dim": 32, "vision_config.intermediate_size": 128},
    },
    "Inkling2ForConditionalGeneration": {"vision_config.text_hidden_size": 32},
    "LlavaNextForConditionalGeneration": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "LlavaNextVideoForConditionalGeneration": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "LlavaOnevisionForConditionalGeneration": {"image_grid_pinpoints": [[32, 64], [64, 32]]},
    "MiniCPMOcrForConditionalGeneration": {"image_token_id": 190, "video_token_id": 191},
    "MiniCPMV4_6ForConditionalGeneration": {"image_token_id": 190, "video_token_id": 191},
    "MiniCPMV4_7ForConditionalGeneration": {"image_token_id": 190, "video_token_id": 191},
    "Molmo2ForConditionalGeneration": {"adapter_config.vision_feature_layer": [3, 1]},
    "MistralLarge4ForConditionalGeneration": {
        **{"text_config.num_key_value_heads": 4, "text_config.kv_source_layers": None},
        "text_config.indexer_types": None,
    },
    "MuseGlimmerForConditionalGeneration": {"out_hidden_size": 128, "vision_config.merge_size": 2},
    "NemotronH_Omni_Reasoning_V3": {"image_token_id": 190, "vision_hidden_size": 32},
    "PaddleOCRVLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "vision_start_token_id": 192,
        "text_config.rope_parameters": _MROPE,
    },
    "Qwen2_5_VLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Qwen2VLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "vision_start_token_id": 192,
        "text_config.rope_parameters": {**_MROPE, "mrope_interleaved": True},
    },
    "PerceptionLMForConditionalGeneration": {
        "vision_config.architecture": "vit_pe_core_large_patch14_336",
        "vision_config.model_args": {
            **{"embed_dim": 32, "img_size": [28, 28], "depth": 2, "num_heads": 4, "global_pool": ""},
            **{"use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [2, 2]},
        },
        "projector_pooling_ratio": 1,
    },
    "Qwen4ExpForConditionalGeneration": {
        **{"text_config.indexer_n_heads": 4, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 8},
        **{"text_config.indexer_budget": 64, "text_config.indexer_compress_ratio": 4},
    },
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 16, "vision_config.image_size": 128},
    "VipLlavaForConditionalGeneration": {"vision_feature_layers": [-2, -1, 1]},
}
"""By class, what differs from `shrunk_config`'s own."""
