"""Qwen3-VL: `Qwen3VLForConditionalGeneration` and its mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from ..parts import Part
from .facts import Preparation
from .qwen_base import QwenVL, qwen_preparation


class Qwen3VL(QwenVL):
    """Full attention in every layer of the tower, and deep features that the language model adds in its first layers.

    The frames of a video stand apart in the prompt, each after the text of its time. All of them are one video: its budget
    is shared, and the times of frames that lose all tokens stay, for they are text.
    """

    name: ClassVar[str] = "Qwen3-VL"
    model_classes: ClassVar[tuple[str, ...]] = (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")
    preparation: ClassVar[Preparation] = qwen_preparation("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
    parts: ClassVar[tuple[Part, ...]] = (
        *QwenVL.parts,
        Part("language_model", ("visual_pos_masks", "deepstack_visual_embeds")),
    )

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """One half of everything."""
        return IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
