"""The families of the contract matrix: a new family is one line here."""

from __future__ import annotations

from support.families import (
    gemma3,
    gemma4,
    glm4v,
    idefics3,
    internvl,
    llava_next,
    llava_next_video,
    llava_onevision,
    paddleocr_vl,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    vip_llava,
)
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED, FamilyCase

FAMILY_CASES: tuple[FamilyCase, ...] = (
    LLAVA_CLIP_GQA,
    LLAVA_SIGLIP_TIED,
    *vip_llava.CASES,
    *llava_next.CASES,
    *llava_next_video.CASES,
    *llava_onevision.CASES,
    *qwen2_vl.CASES,
    *qwen2_5_vl.CASES,
    *qwen3_vl.CASES,
    *qwen3_5.CASES,
    *internvl.CASES,
    *idefics3.CASES,
    *glm4v.CASES,
    *gemma3.CASES,
    *gemma4.CASES,
    *pixtral.CASES,
    *paddleocr_vl.CASES,
)
