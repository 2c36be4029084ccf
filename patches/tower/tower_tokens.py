"""What a reduced vision tower hands on, and how the language model's entry is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection

if TYPE_CHECKING:
    from ..encoder.run import TowerReduction
    from ..families.family import Family
    from ..prefill.visuals import PrefillVisuals


@dataclass(frozen=True, eq=False)
class TowerTokens:
    """The patches of all tiles of one encoding, and what they were reduced to.

    Attributes:
        groups: int64 `[tiles, patches]`, the token that each patch went into, -1 where it was dropped.
        places: int64 `[tiles, outputs]`, the patches whose places are taken, ascending.
        order: int64 `[tiles, outputs]`, for each place the token of the tower that takes it.
        merged: whether the language model gets `outputs` tokens of a tile, or one for every patch.
    """

    groups: Tensor
    places: Tensor
    order: Tensor
    merged: bool

    @property
    def sources(self) -> Tensor:
        """int64 `[tiles, patches]`: the place, by its number, whose token stands where a patch was."""
        outputs = self.places.shape[1]
        numbers = torch.arange(outputs, device=self.places.device).expand_as(self.places)
        return self.groups.scatter(1, self.places, numbers)


def tower_tokens(run: TowerReduction) -> TowerTokens:
    """Return what a run of the tower hands on, after its last reducing block."""
    leading, outputs = run.leading, run.plan[-1]
    groups = run.tokens.groups[:, leading : leading + run.patches] - leading
    groups = torch.where((groups < 0) | (groups >= outputs), -1, groups)
    taken = run.tokens.positions[:, leading : leading + outputs] - leading
    numbers = torch.arange(outputs, device=taken.device).expand_as(taken)
    places, order = taken.sort(1)
    if run.method.order == "official":
        order = numbers
    rank = torch.empty_like(order).scatter_(1, order, numbers)
    groups = torch.where(groups < 0, -1, rank.gather(1, groups.clamp(min=0)))
    return TowerTokens(groups, places, order, run.method.output == "merged")


def merged_selection(visuals: PrefillVisuals) -> Selection | None:
    """Return the placeholders that stay where the tower handed on fewer tokens; None where it handed on all of them."""
    kept: list[Tensor] = []
    groups: list[Tensor] = []
    counts: list[int] = []
    for shown in visuals.encoded:
        tower = shown.visuals.tower
        if tower is None or not tower.merged:
            for image in shown.images:
                whole = torch.arange(shown.visuals.counts[image])
                kept.append(whole)
                groups.append(whole)
                counts.append(len(whole))
            continue
        for image in shown.images:
            kept.append(tower.places[image])
            groups.append(tower.groups[image])
            counts.append(tower.places.shape[1])
    if not any(shown.visuals.tower is not None and shown.visuals.tower.merged for shown in visuals.encoded):
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
        parts = tower.groups.split(list(family.tile_counts(shown.visuals)))
        found += [parts[image] for image in shown.images]
    return found


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
