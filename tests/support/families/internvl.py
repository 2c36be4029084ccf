"""Tiny InternVL models: a CLS token, queries and keys normed or not, four patches a visual token, grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from support.families.anyres_case import finish
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, TOWER, FamilyCase, seeded_pixels

SIDE, PATCH = 40, 4
# Crops and thumbnail of a picture follow each other in one run, each a record of its own.
TILES = {"large": 3}


def _maker(**vision: Any) -> Callable[[torch.dtype], Any]:
    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        config = InternVLConfig(
            vision_config=InternVLVisionConfig(**TOWER, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH], **vision),
            text_config=LLAMA_GQA.to_dict(),
            image_token_id=IMAGE_TOKEN,
            image_seq_length=25,
        )
        return finish(InternVLForConditionalGeneration(config), dtype)

    return build


def _image(name: str) -> dict[str, Tensor]:
    return {"pixel_values": seeded_pixels(name, TILES.get(name, 1), 3, SIDE, SIDE)[0]}


def _tokens(name: str) -> int:
    return 25 * TILES.get(name, 1)


INTERNVL = FamilyCase("internvl", _maker(use_qk_norm=True, norm_type="rms_norm"), _image, _tokens)
INTERNVL_PLAIN = FamilyCase("internvl-plain", _maker(attention_bias=True), _image, _tokens)
CASES = (INTERNVL,)
