"""How each model type looks at pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from vlmprune.errors import unknown
from vlmprune.methods.batch import TowerFacts

from .tower_macs_dense import dense_projector_macs, dense_segments, dense_tower_facts, dense_tower_macs
from .tower_macs_packed import packed_projector_macs, packed_segments, packed_tower_facts, packed_tower_macs
from .vision_work import VisionWork, grids, one_crop_each, tiles, tiles_of_single_images


@dataclass(frozen=True)
class VisionFamily:
    """Cost functions of a model type.

    `work(config, inputs, images)` reads from the processor's `inputs` of a batch, with `images` pictures in each row,
    what every row gives the tower. `macs(config, work)` gives (tower, projector) MACs, `segments(config, work, layer)`
    the numbers of tower tokens that attend to each other, `facts(config)` what methods ask of the tower,
    `projector(config)` the projector's MACs for one visual token.
    """

    work: Callable[[PreTrainedConfig, Mapping[str, Any], Sequence[int]], list[VisionWork]]
    macs: Callable[[PreTrainedConfig, VisionWork], tuple[int, int]]
    segments: Callable[[PreTrainedConfig, VisionWork, int], list[int]]
    facts: Callable[[PreTrainedConfig], TowerFacts]
    projector: Callable[[PreTrainedConfig], int]


def _dense(
    work: Callable[[PreTrainedConfig, Mapping[str, Any], Sequence[int]], list[VisionWork]],
) -> VisionFamily:
    return VisionFamily(work, dense_tower_macs, dense_segments, dense_tower_facts, dense_projector_macs)


_PACKED = VisionFamily(grids, packed_tower_macs, packed_segments, packed_tower_facts, packed_projector_macs)

VISION_FAMILIES: dict[str, VisionFamily] = {
    "llava": _dense(one_crop_each),
    "vipllava": _dense(one_crop_each),
    "llava_next": _dense(tiles),
    "llava_onevision": _dense(tiles_of_single_images),
    "qwen2_vl": _PACKED,
    "qwen2_5_vl": _PACKED,
    "qwen3_vl": _PACKED,
    "qwen3_vl_moe": _PACKED,
}
"""By `config.model_type`."""


def vision_family(config: PreTrainedConfig) -> VisionFamily:
    """The family of a configuration; raises `UnknownNameError` for a model type that is not among them."""
    if config.model_type not in VISION_FAMILIES:
        raise unknown("model type", config.model_type, VISION_FAMILIES)
    return VISION_FAMILIES[config.model_type]
