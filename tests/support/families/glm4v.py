"""Tiny GLM-4V models, and prompts for them: videos have the placeholders of images, so a batch has either."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)

from support.families.qwen_case import (
    PATCH,
    TEXT,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    QwenCase,
    finish,
    is_video,
    merged_tokens,
    patches,
)
from support.tiny_models import IMAGE_TOKEN, Row

VIDEO_START, VIDEO_END = 115, 114
_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
_TEXT = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_VISION = {
    **{"depth": 3, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 24},
    **{"patch_size": PATCH, "image_size": 8 * PATCH},
}


class Glm4vCase(QwenCase):
    """A tiny GLM-4V model."""

    images_or_videos: ClassVar[bool] = True

    def types(self, ids: Tensor) -> Tensor:
        """Return 1 at placeholders of images, 2 at those of videos, 0 elsewhere."""
        inside = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
        visual = ids == IMAGE_TOKEN
        return (visual & ~inside).int() + 2 * (visual & inside).int()

    def _ids(self, row: Row) -> list[int]:
        ids: list[int] = []
        for item in row:
            if not isinstance(item, str) or not is_video(item):
                ids += super()._ids([item])
                continue
            frames = self.frames(item)
            ids.append(VIDEO_START)
            for frame in range(frames):
                ids += [VISION_START, *[IMAGE_TOKEN] * (self.tokens(item) // frames), VISION_END, 50 + frame]
            ids.append(VIDEO_END)
        return ids

    def frames(self, name: str) -> int:
        """Return the frames of a video, two of the camera's each."""
        return int(self.image(name)["video_grid_thw"][0, 0])


def _build(config_class: Any, model_class: Any) -> Callable[[torch.dtype], Any]:
    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        config = config_class(text_config=dict(_TEXT), vision_config=dict(_VISION), **_TOKENS)
        return finish(model_class(config), dtype)

    return build


GLM4V = Glm4vCase("glm4v", _build(Glm4vConfig, Glm4vForConditionalGeneration), patches, merged_tokens)
GLM46V = Glm4vCase("glm46v", _build(Glm46VConfig, Glm46VForConditionalGeneration), patches, merged_tokens)
CASES = (GLM4V, GLM46V)
