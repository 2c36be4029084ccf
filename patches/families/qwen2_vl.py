"""Qwen2-VL: `Qwen2VLForConditionalGeneration`."""

from __future__ import annotations

from typing import ClassVar

from .qwen_base import QwenVL


class Qwen2VL(QwenVL):
    """Full attention in every layer of the tower."""

    name: ClassVar[str] = "Qwen2-VL"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2VLForConditionalGeneration",)
    text_positions: ClassVar[bool] = False
