"""Tiny models with a Pixtral tower, and prompts for them: a break token behind every row of visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

from support.families.anyres_case import finish
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, TOWER, FamilyCase, Row, seeded_pixels

PATCH = 4
BREAK, END = 117, 116
# Rows and columns of visual tokens.
GRIDS = {"small": (3, 4), "large": (6, 8), "default": (6, 6)}
_LARGEST = 8


def grid_of(name: str) -> tuple[int, int]:
    """Return rows and columns of visual tokens of a named image."""
    return GRIDS.get(name, GRIDS["default"])


@dataclass(frozen=True, repr=False)
class PixtralCase(FamilyCase):
    """A tiny model of which an image is many runs of placeholders."""

    def _ids(self, row: Row) -> list[int]:
        ids: list[int] = []
        for item in row:
            if not isinstance(item, str):
                ids += super()._ids([item])
                continue
            rows, columns = grid_of(item)
            for _ in range(rows):
                ids += [*[IMAGE_TOKEN] * columns, BREAK]
            ids[-1] = END
        return ids


def _case(name: str, side: int, config: Callable[[], Any], model_class: Any) -> PixtralCase:
    unit = PATCH * side

    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        return finish(model_class(config()), dtype, unused=(BREAK, END))

    def image(picture: str) -> dict[str, Tensor]:
        rows, columns = grid_of(picture)
        pixels = torch.zeros(1, 3, _LARGEST * unit, _LARGEST * unit)
        pixels[..., : rows * unit, : columns * unit] = seeded_pixels(picture, 3, rows * unit, columns * unit)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[rows * unit, columns * unit]])}

    return PixtralCase(name, build, image, lambda picture: grid_of(picture)[0] * grid_of(picture)[1])


def _vision() -> dict[str, Any]:
    tower = {key: value for key, value in TOWER.items() if key != "projection_dim"}
    return PixtralVisionConfig(**tower, image_size=_LARGEST * 2 * PATCH, patch_size=PATCH).to_dict()


def _mistral3() -> Any:
    return Mistral3Config(
        vision_config=_vision(),
        text_config=LLAMA_GQA.to_dict(),
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


def _llava() -> Any:
    return LlavaConfig(
        vision_config=_vision(),
        text_config=LLAMA_GQA.to_dict(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


MISTRAL3 = _case("mistral3", 2, _mistral3, Mistral3ForConditionalGeneration)
LLAVA_PIXTRAL = _case("llava-pixtral", 1, _llava, LlavaForConditionalGeneration)
CASES = (MISTRAL3, LLAVA_PIXTRAL)
