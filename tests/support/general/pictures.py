"""Pixels for any class that encodes images, made from what its `get_image_features` takes and what its configuration says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from support.tiny_models import seeded_pixels

_SIZES = {"A": (4, 4), "B": (4, 8), "small": (4, 4), "large": (8, 8)}


def recipes(encode: Any, config: Any) -> Iterator[Any]:
    """Yield functions from the name of an image to the processor's tensors of it, the most likely first."""
    taken = inspect.signature(encode).parameters
    vision = getattr(config, "vision_config", None) or config
    if "image_grid_thw" in taken:
        yield from (_grids(vision, flat, "image_grid_thw", taken) for flat in (True, False))
    if "spatial_shapes" in taken:
        yield _spatial(vision)
    if "image_position_ids" in taken:
        yield from (_positions(patch, side) for patch in _patches(config) for side in (6, 4))
    if "target_sizes" in taken:
        yield _targets(vision)
    side = int(_number(getattr(vision, "image_size", None), 32))
    if "image_grid_hw" in taken:
        yield _sizes_of(vision, "image_grid_hw")
    if "pixel_attention_mask" in taken:
        yield lambda name: {
            "pixel_values": seeded_pixels(name, 1, 3, side, side),
            "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.int64),
        }
        yield lambda name: {
            "pixel_values": seeded_pixels(name, 1, 3, side, side),
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        }
        yield lambda name: {"pixel_values": seeded_pixels(name, 1, 3, side, side)}
    if "high_res_pixel_values" in taken:
        high = int(_number(getattr(config.high_res_vision_config, "image_size", None), 32))
        yield lambda name: {
            "pixel_values": seeded_pixels(name, 3, side, side),
            "high_res_pixel_values": seeded_pixels(name, 3, high, high),
        }
    if "image_sizes" in taken:
        yield lambda name: {
            "pixel_values": seeded_pixels(name, 3, side, side),
            "image_sizes": torch.tensor([[side, side]]),
        }
        yield lambda name: {
            "pixel_values": seeded_pixels(name, 1, 3, side, side),
            "image_sizes": torch.tensor([[side, side]]),
        }
        yield lambda name: {
            "pixel_values": seeded_pixels(name, 3, 3, side, side),
            "image_sizes": torch.tensor([[side, 2 * side]]),
        }
    for size in (side, 32, 64, 28):
        yield lambda name, size=size: {"pixel_values": seeded_pixels(name, 3, size, size)}
        yield lambda name, size=size: {"pixel_values": seeded_pixels(name, 1, 3, size, size)}
        yield lambda name, size=size: {"pixel_values": seeded_pixels(name, size * size // 64, 3 * 64)}


def _number(value: Any, default: int) -> int:
    if isinstance(value, (list, tuple)):
        value = value[0]
    return default if value is None else int(value)


def _grids(vision: Any, flat: bool, name: str, taken: Any) -> Any:
    patch, colours = _number(vision.patch_size, 8), _number(getattr(vision, "in_channels", None) or 3, 3)
    temporal = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None)
    frames = _number(temporal, 1) if flat else 1
    merge = _number(getattr(vision, "spatial_merge_size", None), 2)

    def picture(image: str) -> dict[str, Tensor]:
        rows, columns = (max(1, size // 2) * merge for size in _SIZES[image])
        shape = (colours * frames * patch * patch,) if flat else (colours, patch, patch)
        pixels = seeded_pixels(image, rows * columns, *shape)[0]
        made = {"pixel_values": pixels, name: torch.tensor([[1, rows, columns]])}
        if "image_merge_sizes" in taken:
            made["image_merge_sizes"] = torch.tensor([merge])
        return made

    return picture


def _sizes_of(vision: Any, name: str) -> Any:
    patch = _number(vision.patch_size, 8)

    def picture(image: str) -> dict[str, Tensor]:
        rows, columns = _SIZES[image]
        pixels = seeded_pixels(image, rows * columns, 3 * patch * patch)[0]
        return {"pixel_values": pixels, name: torch.tensor([[rows, columns]])}

    return picture


def _spatial(vision: Any) -> Any:
    patch = _number(vision.patch_size, 8)

    def picture(image: str) -> dict[str, Tensor]:
        rows, columns = _SIZES[image]
        pixels, mask = torch.zeros(1, 64, 3 * patch * patch), torch.zeros(1, 64, dtype=torch.int64)
        pixels[:, : rows * columns] = seeded_pixels(image, rows * columns, 3 * patch * patch)
        mask[:, : rows * columns] = 1
        return {
            "pixel_values": pixels,
            "spatial_shapes": torch.tensor([[rows, columns]]),
            "pixel_attention_mask": mask,
        }

    return picture


def _patches(config: Any) -> list[int]:
    """Return what may be the side of a patch."""
    vision = getattr(config, "vision_config", None)
    named = [getattr(vision, name, None) for name in ("patch_size", "model_patch_size")]
    return [int(patch) for patch in named if patch] or [8]


def _positions(patch: int, side: int) -> Any:

    def picture(image: str) -> dict[str, Tensor]:
        place = torch.stack([torch.arange(side * side) % side, torch.arange(side * side) // side], -1)
        return {
            "pixel_values": seeded_pixels(image, side * side, 3 * patch * patch).sigmoid(),
            "image_position_ids": place[None],
        }

    return picture


def _targets(vision: Any) -> Any:
    patch = _number(vision.patch_size, 8)

    def picture(image: str) -> dict[str, Tensor]:
        rows, columns = _SIZES[image]
        return {
            "pixel_values": seeded_pixels(image, 3, patch, rows * columns * patch),
            "target_sizes": torch.tensor([[rows, columns]]),
        }

    return picture
