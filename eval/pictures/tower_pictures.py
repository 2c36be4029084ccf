"""The pictures that a vision tower is shown, made from what the processor hands to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmprune.errors import VlmpruneError

Picture = NDArray[np.uint8]


class PictureError(VlmpruneError, ValueError):
    """A picture cannot be read, prepared or drawn."""


def tiles_of_image(processor: Any, image: Any) -> list[Picture]:
    """Return what the tower sees of one image: uint8 `[height, width, 3]` for its thumbnail or itself, then for each crop.

    Args:
        processor: the model's processor, or its image processor.
        image: a PIL picture.

    Raises:
        PictureError: the processor refuses the picture, or hands it over in a way that is not known here.
    """
    part = getattr(processor, "image_processor", processor)
    prepared = _prepared(part, {"images": [image]})
    return _pictures(part, prepared["pixel_values"], prepared.get("image_grid_thw"))


def frames_of_video(processor: Any, video: Any) -> list[Picture]:
    """Return what the tower sees of one video: uint8 `[height, width, 3]` a frame; of frames encoded together the first.

    Args:
        processor: the model's processor, or its video processor.
        video: its frames, uint8 `[frames, height, width, 3]`.

    Raises:
        PictureError: the processor takes no videos, refuses this one, or hands it over in a way that is not known here.
    """
    part = getattr(processor, "video_processor", processor)
    if part is None:
        raise PictureError(f"{type(processor).__name__} takes no videos.")
    prepared = _prepared(part, {"videos": [video], "do_sample_frames": False})
    return _pictures(part, prepared["pixel_values_videos"], prepared.get("video_grid_thw"))


def _prepared(part: Any, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        prepared: Mapping[str, Any] = part(**arguments, return_tensors="pt")
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PictureError(f"{type(part).__name__} refuses the picture: {first}") from error
    return prepared


def _pictures(part: Any, pixels: Tensor, grid: Tensor | None) -> list[Picture]:
    """Return uint8 pictures of `[..., 3, height, width]`, or of packed patches with their grid."""
    if grid is not None:
        frames = _unpacked(part, pixels, tuple(int(size) for size in grid[0]))
    elif pixels.ndim >= 4:
        frames = pixels.flatten(0, -4)
    else:
        raise PictureError(f"{type(part).__name__} hands pictures over as {list(pixels.shape)}, which cannot be drawn.")
    values = frames.float()
    if getattr(part, "do_normalize", True):
        mean, std = torch.tensor(part.image_mean), torch.tensor(part.image_std)
        values = values * std[:, None, None] + mean[:, None, None]
    if getattr(part, "do_rescale", True):
        values = values / part.rescale_factor
    return list(values.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy())


def _unpacked(part: Any, pixels: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the first picture of every temporal patch of `pixels [patches, 3 * frames * side * side]`."""
    times, rows, columns = grid
    merged, side = part.merge_size, part.patch_size
    blocks = pixels.view(
        times, rows // merged, columns // merged, merged, merged, 3, part.temporal_patch_size, side, side
    )
    first = blocks[:, :, :, :, :, :, 0]
    return first.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(times, 3, rows * side, columns * side)
