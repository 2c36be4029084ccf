"""How many tokens of each kind VisionZip keeps in every tile, and where they come in its official order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.methods.shared.tile_segments import even_counts, tile_segments


@dataclass(frozen=True, eq=False)
class VisionZipPlan:
    """What is known of the tokens of a batch before their scores.

    Attributes:
        dominant: patches that each segment of `tile_segments` keeps as they are.
        merging: bool `[tokens]` in the order of the segments, on the CPU, whether the tile merges anything.
        pool_offsets: bounds of the tiles that merge in the pool of their tokens that are not dominant.
        targets: int64 `[targets]` on the CPU, contextual tokens counted inside their tile's part of the pool.
        target_offsets: bounds of the tiles that merge in `targets`.
        merged_places: int64 on the CPU, indices in the pool of the targets, and of the places that CLS tokens take.
        cls_rows: int64 on the CPU, the tiles of the batch whose CLS token is sent, counted over all images.
        stage: int64 like `merged_places`, which part of the official order each belongs to.
        within: int64 like `merged_places`, rank inside that part.
        in_first_tile: bool `[tokens]` on the CPU, packed, whether a patch lies in the thumbnail or in an uncut image.
    """

    dominant: tuple[int, ...]
    merging: Tensor
    pool_offsets: tuple[int, ...]
    targets: Tensor
    target_offsets: tuple[int, ...]
    merged_places: Tensor
    cls_rows: Tensor
    stage: Tensor
    within: Tensor
    in_first_tile: Tensor


class TileShare(NamedTuple):
    """Tokens of each kind that a tile keeps.

    Attributes:
        dominant: patches that are kept as they are.
        contextual: targets that others are merged into.
        cls: 1 where the CLS token is sent, else 0.
    """

    dominant: int
    contextual: int
    cls: int


def tile_share(size: int, count: int, share: float, with_cls: bool) -> TileShare:
    """Return how a tile of `size` patches that keeps `count` tokens splits these; nothing is merged where one or all are kept."""
    if not 1 < count < size:
        return TileShare(count, 0, 0)
    contextual = min(max(1, round(count * share)), count - 1)
    cls = int(with_cls and count - contextual >= 2)
    return TileShare(count - contextual - cls, contextual, cls)


@lru_cache(maxsize=64)
def visionzip_plan(
    layouts: tuple[VisualLayout, ...], budgets: tuple[int, ...], share: float, with_cls: bool
) -> VisionZipPlan:
    """Return the plan for images with these layouts and budgets.

    Args:
        layouts: geometry per image.
        budgets: tokens kept per image.
        share: share of a tile's kept tokens that are contextual.
        with_cls: whether tiles send their CLS token.
    """
    segments = tile_segments(layouts)
    width, counts = segments.sizes.shape[1], even_counts(segments, budgets)
    dominant, merging, pool, ends = [], [], [0], [0]
    targets, target_places, cls_places, cls_rows = [], [], [], []
    target_order, cls_order = [], []
    first_row = 0
    for image, layout in enumerate(layouts):
        sizes, kept = segments.sizes[image].tolist(), counts[image].tolist()
        for tile, (size, count) in enumerate(zip(sizes, kept, strict=True)):
            # Newlines, the last segment, are kept as they are.
            parts = tile_share(size, count, share, with_cls and layout.tile_grid is not None)
            chosen, number, has_cls = parts if tile < width - 1 else TileShare(count, 0, 0)
            dominant.append(chosen)
            merging.append(torch.full((size,), number > 0))
            if not number:
                continue
            left = size - chosen
            step = max(1, left // number)
            targets.append(torch.arange(number) * step)
            target_places.append(targets[-1] + pool[-1])
            target_order += [(2 if tile == 0 else 5, (tile << 32) + place) for place in range(number)]
            if has_cls:
                # The first that is no target.
                cls_places.append(pool[-1] + (1 if step > 1 else number))
                cls_rows.append(first_row + tile)
                cls_order.append((0 if tile == 0 else 4, tile))
            pool.append(pool[-1] + left)
            ends.append(ends[-1] + number)
        first_row += 1 + (layout.crops[0] * layout.crops[1] if layout.crops else 0)
    stages = torch.tensor([*target_order, *cls_order], dtype=torch.int64).view(-1, 2)
    none = [torch.zeros(0, dtype=torch.int64)]
    return VisionZipPlan(
        dominant=tuple(dominant),
        merging=torch.cat(merging),
        pool_offsets=tuple(pool),
        targets=torch.cat([*none, *targets]),
        target_offsets=tuple(ends),
        merged_places=torch.cat([*none, *target_places, torch.tensor(cls_places, dtype=torch.int64)]),
        cls_rows=torch.tensor(cls_rows, dtype=torch.int64),
        stage=stages[:, 0],
        within=stages[:, 1],
        in_first_tile=torch.cat([(layout.tile == 0) & ~layout.newline for layout in layouts]),
    )
