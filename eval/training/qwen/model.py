"""tiny-qwen2.5-vl: configuration, start weights, processor and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from ..common.checkpoint import MEAN, STD, greedy_decoding, save_folder
from ..common.language import WIDTH, language_config
from ..common.scenes import PATCH_SIZE
from ..common.tokenizer import build_tokenizer as build_base
from .tokenizer import IMAGE, VIDEO, VISION_END, VISION_START, build_tokenizer

MERGE = 2
TOKEN_SIZE = MERGE * PATCH_SIZE
"""Side in pixels of what one visual token covers."""
LLAVA = Path(__file__).parents[2] / "checkpoints" / "tiny-llava"
MROPE_SECTION = [1, 2, 13]
"""Of 16 frequencies (1 to 2e-5): one for time, two for rows, the rest for columns.

So rows and columns both turn visibly over 12 to 20 steps, and all slower frequencies, by which content is compared, stay as
tiny-llava's language model knows them.
"""


def qwen_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Six layers of width 128 in the tower and six in the language model, which has the geometry of tiny-llava's.

    The third and the last layer of the tower have full attention, the others windows of 64 px.
    """
    llama = language_config(build_base())
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 6,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 64,
            "fullatt_block_indexes": [2, 5],
            "out_hidden_size": WIDTH,
            "tokens_per_second": 2,
            "initializer_range": 0.05,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": llama.intermediate_size,
            "num_hidden_layers": llama.num_hidden_layers,
            "num_attention_heads": llama.num_attention_heads,
            "num_key_value_heads": llama.num_key_value_heads,
            "rms_norm_eps": llama.rms_norm_eps,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "mrope_section": MROPE_SECTION},
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        tie_word_embeddings=True,
        **ids,
    )


_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


@torch.no_grad()
def build_model() -> Qwen2_5_VLForConditionalGeneration:
    """The model with an untrained tower and the shipped tiny-llava's language model (attention biases zero)."""
    tokenizer = build_tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(qwen_config(tokenizer))
    llava = AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32)
    states = llava.model.language_model.state_dict()
    words = states.pop("embed_tokens.weight")
    missing, unexpected = model.model.language_model.load_state_dict(states, strict=False)
    strange = [name for name in missing if not name.endswith("_proj.bias") and name != "embed_tokens.weight"]
    if strange or unexpected:
        raise RuntimeError(f"tiny-llava's language model does not fit: {strange} missing, {unexpected} unexpected")
    for layer in model.model.language_model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias.zero_()
    model.get_input_embeddings().weight[: len(words)] = words
    model.generation_config = greedy_decoding(tokenizer)
    return model.eval()


def build_processor(more: Sequence[str] = ()) -> Qwen2_5_VLProcessor:
    """The processor: pictures keep their size, rounded to visual tokens of 16 x 16 px, between 16 and 576 tokens.

    `more` are further words of its tokenizer.
    """
    tokenizer = build_tokenizer(more)
    settings = {
        "size": {"shortest_edge": 16 * TOKEN_SIZE**2, "longest_edge": 576 * TOKEN_SIZE**2},
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**settings),
        chat_template=tokenizer.chat_template,
    )


def export(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write model (bf16), processor and tokenizer as an ordinary checkpoint folder."""
    save_folder(model, build_processor(), folder)
