"""How each family looks at pictures: what its facts mean for the work of its vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.encoder_method import EncoderMethod
from vlmprune.patches.families.facts import PictureKind, TowerKind
from vlmprune.patches.families.registry import family_of_config

from .tower_macs_dense import (
    dense_projector_hidden,
    dense_projector_macs,
    dense_segments,
    dense_tiles,
    dense_tower_macs,
    dense_unit,
)
from .tower_macs_packed import (
    packed_projector_hidden,
    packed_projector_macs,
    packed_segments,
    packed_tiles,
    packed_tower_macs,
    packed_unit,
)
from .vision_work import VisionWork, grids, one_crop_each, tiles, tiles_of_single_images

Work = Callable[..., list[VisionWork]]
Macs = Callable[[PreTrainedConfig, VisionWork, EncoderMethod | None], tuple[int, int]]
Tiles = Callable[[PreTrainedConfig, VisionWork], list[tuple[int, tuple[int, int]]]]
Segments = Callable[[PreTrainedConfig, VisionWork, int], list[int]]
Projector = Callable[[PreTrainedConfig], int]

WORK: dict[PictureKind, Work] = {
    "one tile": one_crop_each,
    "tiles": tiles,
    "tiles of single pictures": tiles_of_single_images,
    "grids": grids,
}
TOWERS: dict[TowerKind, tuple[Macs, Tiles, Projector, Segments, Projector, Projector]] = {
    "dense": (dense_tower_macs, dense_tiles, dense_unit, dense_segments, dense_projector_macs, dense_projector_hidden),
    "packed": (
        packed_tower_macs,
        packed_tiles,
        packed_unit,
        packed_segments,
        packed_projector_macs,
        packed_projector_hidden,
    ),
}


@dataclass(frozen=True)
class VisionCost:
    """Cost functions of a family.

    Attributes:
        work: `work(config, inputs, images, videos=())` reads from the processor's `inputs` of a batch, with `images` pictures
            and `videos` videos in each row, what every row gives the tower.
        macs: `macs(config, work, method)` gives MACs of tower and projector, with what reduces tokens in the tower or None.
        tiles: `tiles(config, work)` gives how many tiles or frames there are of how many rows and columns of tokens that an
            encoder method reduces.
        unit: `unit(config)` gives the patches of such a token.
        segments: `segments(config, work, layer)` gives the numbers of tower tokens that attend to each other.
        projector: `projector(config)` gives the projector's MACs for one visual token.
        projector_hidden: `projector_hidden(config)` gives the width between the projector's layers.
        facts: `facts(config)` gives what methods ask of the tower.
    """

    work: Work
    macs: Macs
    tiles: Tiles
    unit: Projector
    segments: Segments
    projector: Projector
    projector_hidden: Projector
    facts: Callable[[PreTrainedConfig], TowerFacts]


def vision_cost(config: PreTrainedConfig) -> VisionCost:
    """Cost functions of the family of a configuration.

    Raises:
        UnknownNameError: the model type is of no supported family.
    """
    family = family_of_config(config)
    return VisionCost(WORK[family.picture_kind], *TOWERS[family.tower_kind], family.tower_facts_of)
