"""Qwen2-VL: `Qwen2VLForConditionalGeneration`."""

from __future__ import annotations

from typing import ClassVar

from .facts import Preparation
from .qwen_base import QwenVL, qwen_preparation


class Qwen2VL(QwenVL):
    """Full attention in every layer of the tower."""

    name: ClassVar[str] = "Qwen2-VL"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    text_positions: ClassVar[bool] = False
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    preparation: ClassVar[Preparation] = qwen_preparation("Qwen2VLProcessor")
