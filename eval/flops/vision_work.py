"""What the vision tower is given for one request, read from the processor's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches


@dataclass(frozen=True)
class VisionWork:
    """Pictures of one request as the tower sees them.

    `crops`: pictures of the tower's fixed size (tiles and video frames included), or of `side` patches along their sides;
    `pooled`: how many of them are frames that are pooled before the projector.
    `grids`: (frames, rows, columns) of patches of every picture or video, for towers that take any size. `kept`: visual tokens
    of each of them that the tower's blocks run on, where a method drops the others before the tower.
    """

    crops: int = 0
    side: int | None = None
    pooled: int = 0
    grids: tuple[tuple[int, int, int], ...] = ()
    kept: tuple[int, ...] | None = None


def one_crop_each(
    config: PreTrainedConfig, inputs: Mapping[str, Any], images: Sequence[int], videos: Sequence[int] = ()
) -> list[VisionWork]:
    """One crop an image (LLaVA-1.5, VipLLaVA)."""
    pixels, vision = inputs.get("pixel_values"), config.vision_config
    width = vision.image_size if pixels is None else pixels.shape[-1]
    side = None if width == vision.image_size else width // vision.patch_size
    return [VisionWork(crops=count, side=side) for count in images]


def tiles(
    config: PreTrainedConfig, inputs: Mapping[str, Any], images: Sequence[int], videos: Sequence[int] = ()
) -> list[VisionWork]:
    """Thumbnail and crops of every image, and frames, which are pooled (LLaVA-NeXT); padding tiles do not enter the tower."""
    counts = _tiles_by_image(config, inputs)
    spans, frames = pairwise(accumulate(images, initial=0)), _frames_of_videos(inputs)
    return [
        VisionWork(crops=sum(counts[start:end]) + shown * frames, pooled=shown * frames)
        for (start, end), shown in zip(spans, videos or [0] * len(images), strict=True)
    ]


def tiles_of_single_images(
    config: PreTrainedConfig, inputs: Mapping[str, Any], images: Sequence[int], videos: Sequence[int] = ()
) -> list[VisionWork]:
    """As `tiles`, but the images of a prompt with several are one crop each, as are the frames of videos (LLaVA-OneVision)."""
    counts = _tiles_by_image(config, inputs)
    spans = list(pairwise(accumulate(images, initial=0)))
    frames = _frames_of_videos(inputs)
    return [
        VisionWork(crops=(sum(counts[start:end]) if end - start == 1 else end - start) + shown * frames)
        for (start, end), shown in zip(spans, videos or [0] * len(images), strict=True)
    ]


def grids(
    config: PreTrainedConfig, inputs: Mapping[str, Any], images: Sequence[int], videos: Sequence[int] = ()
) -> list[VisionWork]:
    """Grid of patches of every image and every video (Qwen)."""
    of_images = _grids_by_row(inputs.get("image_grid_thw"), images)
    of_videos = _grids_by_row(inputs.get("video_grid_thw"), videos or [0] * len(images))
    return [VisionWork(grids=(*first, *then)) for first, then in zip(of_images, of_videos, strict=True)]


def _frames_of_videos(inputs: Mapping[str, Any]) -> int:
    """Frames of each video where all have as many, `pixel_values_videos` `[videos, frames, ...]`."""
    pixels = inputs.get("pixel_values_videos")
    return 0 if pixels is None else int(pixels.shape[1])


def _grids_by_row(found: Any, counts: Sequence[int]) -> list[tuple[tuple[int, int, int], ...]]:
    shapes = [(int(t), int(h), int(w)) for t, h, w in found] if found is not None else []
    return [tuple(shapes[start:end]) for start, end in pairwise(accumulate(counts, initial=0))]


def _tiles_by_image(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[int]:
    sizes = inputs.get("image_sizes")
    if sizes is None:
        return []
    side = config.vision_config.image_size
    return [image_size_to_num_patches(list(map(int, size)), config.image_grid_pinpoints, side) for size in sizes]
