"""Qwen3.5: `Qwen3_5ForConditionalGeneration` and its mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from .decoder import decoder_gap
from .facts import Preparation
from .qwen_base import QwenVL, qwen_preparation


class Qwen35(QwenVL):
    """A tower as of Qwen3-VL without deep features, and a decoder most of whose layers keep one state of all tokens before.

    Those layers see the compacted sequence: their states and convolutions run over the tokens that are left, padding on the left
    and zeroed. Of tokens between layers only those with full attention know keys. The frames of a video stand apart in the
    prompt, each after the text of its time.
    """

    name: ClassVar[str] = "Qwen3.5"
    model_classes: ClassVar[tuple[str, ...]] = (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    )
    model_types: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[Preparation] = qwen_preparation("Qwen3VLProcessor", "Qwen3VLVideoProcessor")

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """One half of everything."""
        return IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

    @cached_property
    def decoder_gap(self) -> str | None:
        """Why tokens cannot be dropped between decoder layers: most of them know no keys of single tokens."""
        return decoder_gap(self.language_model, range(self.decoder_layers))
