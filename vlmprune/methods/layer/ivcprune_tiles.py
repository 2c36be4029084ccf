"""The choice of IVC-Prune in an image cut in tiles: the thumbnail decides, and position by tile or by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.layout import VisualLayout
from vlmprune.methods.layer.ivcprune_image import IVCChoice
from vlmprune.methods.shared.tile_segments import to_device

PositionsBy = Literal["tile", "row"]


@dataclass(frozen=True, eq=False)
class TilePlaces:
    """Where the tokens of an image of several tiles lie; tensors have one entry a token that is alive.

    Attributes:
        thumbnail: int64, the tokens of the thumbnail, ascending.
        cell: int64 `[tokens]`, for a crop's token the place in `thumbnail` of the token that shows its centre; -1 for others, and
            where that one is gone.
        group: int64 `[tokens]`, the tile, or the row of the stitched crops, of a crop's token; -1 for others.
    """

    thumbnail: Tensor
    cell: Tensor
    group: Tensor


def tile_places(layout: VisualLayout, alive: Tensor, by: PositionsBy) -> TilePlaces | None:
    """Return the places of the tokens `alive`, int64 indices into the image's order; None if nothing is left to split.

    The thumbnail shows all of the stitched crops. Newlines are in no tile.
    """
    if layout.crops is None or layout.tile_grid is None:
        return None
    patches = ~layout.newline
    rows, columns = (
        _scaled(place, (layout.tile > 0) & patches, side)
        for place, side in zip((layout.stitched_row, layout.stitched_column), layout.tile_grid, strict=True)
    )
    in_thumbnail, in_crop = (layout.tile == 0) & patches, (layout.tile > 0) & patches
    group = torch.where(in_crop, layout.tile if by == "tile" else layout.stitched_row, -1)
    shown = torch.where(in_crop, rows * layout.tile_grid[1] + columns, -1)
    own = torch.where(in_thumbnail, layout.row * layout.tile_grid[1] + layout.column, -1)
    shown, own, group = (to_device(each, alive.device)[alive] for each in (shown, own, group))
    thumbnail = (own >= 0).nonzero().flatten()
    if len(thumbnail) == 0 or not bool((group >= 0).any()):
        return None
    place = torch.full((layout.tile_grid[0] * layout.tile_grid[1],), -1, device=alive.device)
    place[own[thumbnail]] = torch.arange(len(thumbnail), device=alive.device)
    return TilePlaces(thumbnail, torch.where(shown >= 0, place[shown.clamp(min=0)], -1), group)


def _scaled(place: Tensor, inside: Tensor, side: int) -> Tensor:
    """Return which of `side` equal parts of what the crops' tokens span holds each token's centre."""
    first, last = place[inside].aminmax() if bool(inside.any()) else (place.new_zeros(()), place.new_zeros(()))
    return ((place - first).clamp(min=0) * 2 + 1) * side // (2 * (last - first + 1))


def choose_by_tiles(
    places: TilePlaces,
    cosines: Tensor,
    sines: Tensor,
    of_thumbnail: Callable[[Tensor], IVCChoice],
    share: float,
    total: int,
) -> Tensor:
    """Return the tokens that stay, int64 `[total]`, ascending.

    Args:
        places: where the tokens lie.
        cosines: fp32 `[tokens]`, mean rotary cosines.
        sines: fp32 `[tokens]`, mean rotary sines.
        of_thumbnail: chooses among the tokens that it is given, those of the thumbnail.
        share: share of each tile's or row's tokens that stays for its cosine, and as many for its sine.
        total: tokens that stay.
    """
    tokens, device = len(cosines), cosines.device
    choice = of_thumbnail(places.thumbnail)
    chosen = torch.zeros(len(places.thumbnail) + 1, dtype=torch.bool, device=device)
    chosen[choice.kept] = True
    # The last entry, for tokens that no cell shows, is never chosen.
    stays = chosen[places.cell]
    stays[places.thumbnail] = chosen[:-1]
    for group in places.group.unique().tolist():
        if group < 0:
            continue
        members = (places.group == group).nonzero().flatten()
        count = min(len(members), round(share * len(members)))
        for means in (cosines, sines):
            stays[members[segmented_topk(means[members], (0, len(members)), (count,))]] = True
    kept = stays.nonzero().flatten()
    if len(kept) >= total:
        return kept[:total]
    # Similarities lie in [0, 1]: first what stays, then the thumbnail, then crops by the token that shows them.
    scores = torch.cat([choice.scores, choice.scores.new_full((1,), -1.0)])[places.cell]
    scores[places.thumbnail] = choice.scores + 2.0
    return segmented_topk(scores.masked_fill(stays, 4.0), (0, tokens), (total,))
