"""Visual token layouts of anyres images (thumbnail, crops, newlines), made by the project's own code."""

from __future__ import annotations

from dataclasses import replace

from transformers import LlavaNextConfig

from vlmprune.layout import VisualLayout
from vlmprune.patches.families.anyres import anyres_image, cropped_image

# LLaVA-NeXT's resolutions in tiles, (rows, columns).
PINPOINTS = tuple((height // 336, width // 336) for height, width in LlavaNextConfig().image_grid_pinpoints)


def best_crops(height: int, width: int, tile: int) -> tuple[int, int]:
    """Return the rows and columns of crops that LLaVA-NeXT chooses for an image of this size."""
    resolutions = [(rows * tile, columns * tile) for rows, columns in PINPOINTS]
    crops = anyres_image((height, width), resolutions, tile, tile).crops
    assert crops is not None
    return crops


def anyres_layout(
    crops: tuple[int, int], side: int, height: int, width: int, *, unpad: bool = True, newlines: bool = True
) -> VisualLayout:
    """Return the layout of an image of `height` x `width` pixels in `crops` of `side` x `side` tokens."""
    image = cropped_image(crops, side, (height, width) if unpad else None)
    return replace(image, newlines=newlines).layout
