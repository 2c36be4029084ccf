"""Tiny Idefics3 and SmolVLM models, and prompts for them: tiles by row of the batch, text before each tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from support.families.anyres_case import finish
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, TOWER, FamilyCase, Row, seeded_pixels

PATCH = 4
FAKE, TILE_MARK = 117, 60
# The global tile is the last.
TILES = {"large": 3}


class Idefics3Case(FamilyCase):
    """A tiny model whose host takes pixels by row, padded with tiles of zeros."""

    def inputs(
        self, rows: Sequence[Row], padding: str = "left", dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the model inputs of a padded batch."""
        inputs = super().inputs([[item for item in row if not isinstance(item, str)] for row in rows], padding, dtype)
        texts = [self._ids(row) for row in rows]
        width = max(map(len, texts))
        for key, values in (("input_ids", texts), ("attention_mask", [[1] * len(row) for row in texts])):
            gaps = [[0] * (width - len(row)) for row in values]
            inputs[key] = torch.tensor(
                [gap + row if padding == "left" else row + gap for gap, row in zip(gaps, values, strict=True)]
            )
        tiles = [[tile for item in row if isinstance(item, str) for tile in self._tiles(item)] for row in rows]
        most = max(map(len, tiles))
        if most:
            side = self.build(dtype).config.vision_config.image_size
            pixels = torch.zeros(len(rows), most, 3, side, side, dtype=dtype)
            for row, own in enumerate(tiles):
                for place, tile in enumerate(own):
                    pixels[row, place] = tile.to(dtype)
            inputs["pixel_values"] = pixels
            inputs["pixel_attention_mask"] = (
                (pixels != 0).any(2).flatten(2).any(-1)[..., None, None].expand(-1, -1, side, side)
            )
        return inputs

    def _tiles(self, name: str) -> Tensor:
        return self.image(name)["pixel_values"][0]

    def _ids(self, row: Row) -> list[int]:
        ids: list[int] = []
        for item in row:
            if not isinstance(item, str):
                ids += super()._ids([item])
                continue
            tiles = TILES.get(item, 1)
            for tile in range(tiles):
                ids += [FAKE, TILE_MARK + tile, *[IMAGE_TOKEN] * (self.tokens(item) // tiles)]
            ids.append(FAKE)
        return ids


def _case(name: str, config_class: Any, model_class: Any, scale: int) -> Idefics3Case:
    side = 5 * scale * PATCH

    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        config = config_class(
            vision_config={**TOWER, "image_size": side, "patch_size": PATCH},
            text_config=LLAMA_GQA.to_dict(),
            image_token_id=IMAGE_TOKEN,
            scale_factor=scale,
            pad_token_id=0,
        )
        return finish(model_class(config), dtype, unused=(FAKE,))

    def image(picture: str) -> dict[str, Tensor]:
        return {"pixel_values": seeded_pixels(picture, TILES.get(picture, 1), 3, side, side)}

    return Idefics3Case(name, build, image, lambda picture: 25 * TILES.get(picture, 1))


IDEFICS3 = _case("idefics3", Idefics3Config, Idefics3ForConditionalGeneration, 3)
SMOLVLM = _case("smolvlm", SmolVLMConfig, SmolVLMForConditionalGeneration, 2)
CASES = (IDEFICS3, SMOLVLM)
