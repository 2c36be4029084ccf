"""Prompts for tiny models that cut images in tiles: tile dimension padded, a size for every name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from support.tiny_models import IMAGE_TOKEN, PAD, seeded_pixels, spread_weights

TILE, PATCH = 20, 4
Size = tuple[int, int]


def tiled_pixels(name: str, size: Size, tiles: int, padded_tiles: int) -> dict[str, Tensor]:
    """Return the processor's tensors of an image: `tiles` of noise and zeros up to `padded_tiles`, and its size."""
    pixels = torch.zeros(1, padded_tiles, 3, TILE, TILE)
    pixels[:, :tiles] = seeded_pixels(name, tiles, 3, TILE, TILE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def size_of(sizes: Mapping[str, Size], name: str) -> Size:
    """Return the size of a named image: its own entry, or the default."""
    return sizes.get(name, sizes["default"])


def finish(model: Any, dtype: torch.dtype, unused: Sequence[int] = ()) -> Any:
    """Spread the weights, and keep the model from generating placeholders."""
    spread_weights(model)
    with torch.no_grad():
        for token in unused:
            # Logit 0 is never the largest.
            model.lm_head.weight[token] = 0
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    return model.to(dtype).eval()
