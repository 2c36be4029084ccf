"""A tiny LLaVA-OneVision: a SigLIP tower of 5 x 5 patches, tied embeddings, maps of more than 60 patches interpolated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig

from support.families.anyres_case import PATCH, TILE, finish, size_of, tiled_pixels
from support.tiny_models import IMAGE_TOKEN, PAD, QWEN_TIED, TOWER, FamilyCase, Row, seeded_pixels

VIDEO_TOKEN = 118
PINPOINTS = [[rows * TILE, columns * TILE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
# The default image leaves 8 of 10 rows, interpolated from 8 x 15 to 5 x 9; the others stay as they are.
SIZES = {"default": (34, 60), "small": (20, 20), "large": (38, 20), "wide": (11, 40)}
CUTS = {
    "default": (6, 25 + 5 * 10),
    "small": (1, 25 + 5 * 6),
    "large": (2, 25 + 10 * 6),
    "wide": (2, 25 + 3 * 11),
}
ONE_TILE = 25 + 1
FRAMES = {"video small": 2, "video large": 4}


@lru_cache(maxsize=4)
def _build(dtype: torch.dtype) -> Any:
    vision = SiglipVisionConfig(**TOWER, image_size=TILE, patch_size=PATCH, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision.to_dict(),
        text_config=QWEN_TIED.to_dict(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=True,
    )
    return finish(LlavaOnevisionForConditionalGeneration(config), dtype, unused=[VIDEO_TOKEN])


def is_video(name: str) -> bool:
    """Names of videos begin with "video"."""
    return name.startswith("video")


def _image(name: str) -> dict[str, Tensor]:
    if is_video(name):
        return {"pixel_values_videos": seeded_pixels(name, FRAMES.get(name, 3), 3, TILE, TILE)}
    crops, _ = CUTS.get(name, CUTS["default"])
    return tiled_pixels(name, size_of(SIZES, name), 1 + crops, 10)


def _tokens(name: str) -> int:
    if is_video(name):
        return 9 * FRAMES.get(name, 3) + 1
    return CUTS.get(name, CUTS["default"])[1]


@dataclass(frozen=True, repr=False)
class OnevisionCase(FamilyCase):
    """Images are cut in tiles whatever else their row shows; videos of one call have equally many frames."""

    def inputs(
        self, rows: Sequence[Row], padding: str = "left", dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the model inputs of a padded batch."""
        ids = [self._ids(row) for row in rows]
        width = max(map(len, ids))
        inputs: dict[str, Tensor] = {}
        for key, values, fill in (("input_ids", ids, PAD), ("attention_mask", [[1] * len(row) for row in ids], 0)):
            gaps = [[fill] * (width - len(row)) for row in values]
            inputs[key] = torch.tensor(
                [gap + row if padding == "left" else row + gap for gap, row in zip(gaps, values, strict=True)]
            )
        shown = [self.image(item) for row in rows for item in row if isinstance(item, str)]
        for key in dict.fromkeys(key for tensors in shown for key in tensors):
            joined = torch.cat([tensors[key] for tensors in shown if key in tensors])
            inputs[key] = joined.to(dtype) if joined.is_floating_point() else joined
        return inputs

    def _ids(self, row: Row) -> list[int]:
        ids: list[int] = []
        for item in row:
            if isinstance(item, str):
                ids += [VIDEO_TOKEN if is_video(item) else IMAGE_TOKEN] * self.tokens(item)
            else:
                generator = torch.Generator().manual_seed(1000 + 31 * len(ids) + item)
                ids += torch.randint(1, VIDEO_TOKEN - 10, (item,), generator=generator).tolist()
        return ids


LLAVA_ONEVISION = OnevisionCase("llava-onevision", _build, _image, _tokens)
CASES = (LLAVA_ONEVISION,)
