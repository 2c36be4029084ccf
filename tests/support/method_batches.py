"""Batches of random images for the property tests: plain rasters and images cut in tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from official_cases.anyres import anyres_layout
from official_cases.batches import kept_per_image as kept_per_image
from official_cases.batches import make_batch as make_batch
from vlmprune.layout import VisualLayout, raster_layout
from vlmprune.methods.base import Method
from vlmprune.methods.batch import TILE_KINDS, Instruction, Selection, TowerFacts, VisualBatch
from vlmprune.methods.first_layer import FirstLayer
from vlmprune.methods.projector import ProjectorLayers

WITH_CLS = TowerFacts(layers=10, feature_layer=8, has_cls=True)
WITHOUT_CLS = TowerFacts(layers=10, feature_layer=9, has_cls=False)


@st.composite
def layouts(draw: st.DrawFn, tiled: bool = False) -> VisualLayout:
    """An image as a plain raster, or cut in tiles with padding taken off and newlines."""
    if not tiled and draw(st.booleans()):
        return raster_layout(draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    rows, columns = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]))
    height, width = draw(st.integers(60, 140)) * rows, draw(st.integers(60, 140)) * columns
    return anyres_layout((rows, columns), draw(st.integers(2, 6)), height, width, newlines=draw(st.booleans()))


keeps = st.one_of(st.floats(0.01, 1.0), st.integers(1, 300))
towers = st.sampled_from([WITH_CLS, WITHOUT_CLS])


def random_batch(
    method: Method, images: Sequence[VisualLayout], seed: int, tower: TowerFacts = WITH_CLS, equal: bool = False
) -> VisualBatch:
    """Return a batch with random features and attention, or with features and attention that are all the same."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(layout.total for layout in images)

    def values(*shape: int) -> Tensor:
        return torch.ones(shape) if equal else torch.rand(shape, generator=generator)

    newline = torch.cat([layout.newline for layout in images])
    vision, tile_vision = {}, {}
    for signal in method.vision_signals(tower):
        if signal.kind == "kept_pixels":
            grids = [layout.grid or (1, layout.total) for layout in images]
            vision[signal] = method.choose_pixels(values(total, 6), grids)[:, None].float()
            continue
        maps = []
        for layout in images:
            crops = layout.crops or (0, 0)
            side = layout.tile_grid or (1, layout.total)
            maps.append(values(1 + crops[0] * crops[1], side[0] * side[1], 2))
        if signal.kind in TILE_KINDS:
            rows = [tiles[:, 0] for tiles in maps]
            # Each frame of a video is a tile.
            tile_vision[signal] = tuple(
                values(layout.frames, 2) if layout.frames > 1 else tiles
                for layout, tiles in zip(images, rows, strict=True)
            )
            continue
        index = [layout.row * (layout.tile_grid or (1, 1))[1] + layout.column for layout in images]
        picked = [
            tiles[layout.tile, place.clamp(min=0)] for tiles, layout, place in zip(maps, images, index, strict=True)
        ]
        vision[signal] = torch.cat(picked).masked_fill(newline[:, None], 0)
        tile_vision[signal] = tuple(maps)
    words = [2 + layout.total % 3 for layout in images]
    instructions = tuple(Instruction(torch.arange(count), values(count, 8), values(count, 8)) for count in words)
    questions = tuple(values(1 + layout.total % 3, 8) for layout in images)
    more = {"tile_vision": tile_vision, "instructions": instructions, "questions": questions, **PROJECTOR}
    return make_batch(method, images, values(total, 8), vision, tower, **more)


def widened(features: Tensor) -> Tensor:
    """A projector of the features of `random_batch`: `[rows, 2]` to `[rows, 8]`."""
    return features.repeat(1, 4)


PROJECTOR = {
    "project": widened,
    "first_layer": FirstLayer(
        "toy", 8, 4, 0.5, lambda rows: rows.view(-1, 4, 2), lambda rows: rows[:, 4:].view(-1, 2, 2)
    ),
    "projector_layers": lambda: ProjectorLayers(torch.eye(6, 2), None, torch.nn.GELU(), torch.eye(8, 6)),
}


def image_of(whole: VisualBatch, method: Method, index: int) -> VisualBatch:
    """Return one image of a batch as a batch of its own."""
    span = slice(whole.offsets[index], whole.offsets[index + 1])
    vision = {signal: values[span] for signal, values in whole.vision.items()}
    tile_vision = {signal: (maps[index],) for signal, maps in whole.tile_vision.items()}
    span_of_one = slice(index, index + 1)
    texts = {"instructions": whole.instructions[span_of_one], "questions": whole.questions[span_of_one]}
    more = {"tile_vision": tile_vision, **texts, **PROJECTOR}
    return make_batch(method, [whole.layouts[index]], whole.features[span], vision, whole.tower, **more)


def check_selection(selection: Selection, batch: VisualBatch, counts: Sequence[int] | None = None) -> None:
    """Counts as asked for; indices unique, in range and in position order."""
    assert list(selection.counts) == list(batch.budgets if counts is None else counts)
    assert selection.kept.dtype == torch.int64
    assert selection.kept.numel() == sum(selection.counts)
    for kept, total in zip(selection.kept.split(list(selection.counts)), batch.counts, strict=True):
        assert (kept.diff() > 0).all()
        assert kept.numel() == 0 or (kept[0] >= 0 and kept[-1] < total)


def tiles_of(kept: Tensor, layout: VisualLayout) -> list[int]:
    """Return how many tokens of each tile are kept, and of the newlines as last entry."""
    crops = layout.crops or (0, 0)
    patches = kept[~layout.newline[kept]]
    counts = torch.bincount(layout.tile[patches], minlength=1 + crops[0] * crops[1]).tolist()
    return [*counts, int(layout.newline[kept].sum())]
