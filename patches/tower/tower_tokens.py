"""What a reduced vision tower hands on, and how the language model's entry is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection

if TYPE_CHECKING:
    from ..families.family import Family
    from ..prefill.visuals import PrefillVisuals


@dataclass(frozen=True, eq=False)
class MergedPlaces:
    """The places of the tokens that the language model gets.

    Attributes:
        places: int64 `[tiles, outputs]`, the patches whose places are taken, ascending.
        order: int64 `[tiles, outputs]`, for each place the token of the tower that takes it.
        counts: places of each tile where tiles differ, those behind them stand for nothing; else None.
    """

    places: Tensor
    order: Tensor
    counts: tuple[int, ...] | None = None

    def of_tile(self, tile: int) -> Tensor:
        """Return the places of one tile."""
        return self.places[tile] if self.counts is None else self.places[tile, : self.counts[tile]]

    def sources(self, groups: Tensor) -> Tensor:
        """Return the place, by its number, whose token stands where a patch was, int64 `[tiles, patches]`."""
        numbers = torch.arange(self.places.shape[1], device=self.places.device).expand_as(self.places)
        if self.counts is None:
            return groups.scatter(1, self.places, numbers)
        # What stands for nothing goes to one more patch.
        beyond = torch.cat([groups, groups[:, :1]], 1)
        return beyond.scatter(1, self.places, numbers)[:, :-1]


@dataclass(frozen=True, eq=False)
class TowerTokens:
    """The patches of all tiles of one encoding, and what they were reduced to.

    Attributes:
        groups: int64 `[tiles, patches]`, the token that each patch went into, -1 where it was dropped; a sequence of such rows
            where tiles differ in size.
        merged: where the tokens stand that the language model gets; None where it gets one for every patch.
    """

    groups: Tensor | Sequence[Tensor]
    merged: MergedPlaces | None = None


def merged_selection(visuals: PrefillVisuals) -> Selection | None:
    """Return the placeholders that stay where the tower handed on fewer tokens; None where it handed on all of them."""
    kept: list[Tensor] = []
    groups: list[Tensor] = []
    counts: list[int] = []
    merged = False
    for shown in visuals.encoded:
        tower = shown.visuals.tower
        if tower is None or tower.merged is None:
            for image in shown.images:
                whole = torch.arange(shown.visuals.counts[image])
                kept.append(whole)
                groups.append(whole)
                counts.append(len(whole))
            continue
        for image in shown.images:
            kept.append(tower.merged.of_tile(image))
            groups.append(tower.groups[image])
            counts.append(len(kept[-1]))
            merged = True
    if not merged:
        return None
    device = _device(kept)
    return Selection(
        torch.cat([index.to(device) for index in kept]),
        tuple(counts),
        groups=torch.cat([index.to(device) for index in groups]),
    )


def tower_groups(family: Family, visuals: PrefillVisuals) -> list[Tensor]:
    """Return the groups of the tiles of each shown image, `[tiles, patches]`; nothing where the tower reduced nothing."""
    found: list[Tensor] = []
    for shown in visuals.encoded:
        tower = shown.visuals.tower
        if tower is None:
            return []
        tiles = iter(tower.groups)
        parts = [torch.stack([next(tiles) for _ in range(count)]) for count in family.tile_counts(shown.visuals)]
        found += [parts[image] for image in shown.images]
    return found


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
