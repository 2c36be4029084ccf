"""Tiny Gemma 4 models: inputs by layer and shared keys, plainly causal; and images that see themselves both ways."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from support.families.anyres_case import finish
from support.families.gemma_case import BEGIN, END, TEXT, GemmaCase
from support.tiny_models import IMAGE_TOKEN, PAD, VOCABULARY, seeded_pixels

VIDEO_TOKEN, AUDIO_TOKEN = 118, 115
PATCH, CELL, PATCHES = 2, 2, 192
# (rows, columns) of patches before 2 x 2 of them are averaged.
GRIDS = {"small": (8, 8), "large": (12, 16), "default": (10, 12)}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TEXT = {
    **TEXT,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": {**_ROPE, "rope_theta": 1000000.0}},
    "tie_word_embeddings": False,
    "hidden_size_per_layer_input": 0,
}
_BY_LAYER = {
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": PATCH,
    "pooling_kernel_size": CELL,
    "position_embedding_size": 32,
}


def grid_of(name: str) -> tuple[int, int]:
    """Return rows and columns of a named image's patches."""
    return GRIDS.get(name, GRIDS["default"])


def places_of(rows: int, columns: int) -> Tensor:
    """Return the processor's places (x, y) of the patches of a picture, `[1, PATCHES, 2]`, -1 at padding."""
    places = torch.full((1, PATCHES, 2), -1)
    number = torch.arange(rows * columns)
    places[0, : rows * columns] = torch.stack([number % columns, number // columns], -1)
    return places


def picture(name: str) -> dict[str, Tensor]:
    """Return the processor's tensors of an image, padded to `PATCHES` patches."""
    rows, columns = grid_of(name)
    pixels = torch.zeros(1, PATCHES, 3 * PATCH * PATCH)
    pixels[:, : rows * columns] = seeded_pixels(name, rows * columns, 3 * PATCH * PATCH).sigmoid()
    return {"pixel_values": pixels, "image_position_ids": places_of(rows, columns)}


def tokens_of(name: str) -> int:
    """Return the placeholders of a named image."""
    rows, columns = grid_of(name)
    return rows * columns // CELL**2


def _built(dtype: torch.dtype, **text: Any) -> Any:
    config = Gemma4Config(
        text_config={**_TEXT, **text},
        vision_config=dict(_VISION),
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        audio_token_id=AUDIO_TOKEN,
        tie_word_embeddings=False,
    )
    model = finish(Gemma4ForConditionalGeneration(config), dtype, unused=(VIDEO_TOKEN,))
    with torch.no_grad():
        # As in published models; the host finds ids by embeddings, and puts this one in where images are.
        model.get_input_embeddings().weight[PAD] = 0
    return model


@lru_cache(maxsize=4)
def _by_layer(dtype: torch.dtype) -> Any:
    return _built(dtype, **_BY_LAYER)


@lru_cache(maxsize=4)
def _both_ways(dtype: torch.dtype) -> Any:
    return _built(dtype, use_bidirectional_attention="vision", attention_k_eq_v=True)


GEMMA4 = GemmaCase("gemma4", _by_layer, picture, tokens_of, "mm_token_type_ids")
GEMMA4_BOTH_WAYS = GemmaCase("gemma4-both-ways", _both_ways, picture, tokens_of, "mm_token_type_ids")
CASES = (GEMMA4, GEMMA4_BOTH_WAYS)
