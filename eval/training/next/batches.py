"""Training batches of pictures cut into tiles, with labels of tiles, of the whole sequence and of the questions' words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.dropping import Drop, draw_kept, rows_used
from ..common.glyphs import GLYPH_SIZE
from ..common.language import Prompts
from ..common.places import name_places
from ..common.scenes import (
    PATCH_SIZE,
    Scene,
    decode_jpeg,
    encode_jpeg,
    foreground,
    make_scene,
    patch_labels,
    render,
)
from ..llava.tower import GRID
from .tiles import CELLS, FIRST, cut, cut_labels, thumbnail_labels, tile_presence

SQUARE = ((2, 2),)
ALL_GRIDS = ((2, 2), (2, 2), (2, 2), (1, 2), (2, 1), (2, 3), (3, 2))

SMALL_GRIDS = ((2, 2), (1, 2), (2, 1))
TEST_GRIDS = ((2, 2), (2, 2), (2, 2), (2, 2), (2, 3), (1, 2), (2, 1))
COARSE_GRIDS = ((2, 2), (2, 2), (1, 2), (2, 3))


@dataclass(frozen=True)
class TilePlan:
    """What a batch holds: pictures of one of the `grids` (rows, columns of crops), `cells` patches a side of a crop."""

    size: int
    grids: tuple[tuple[int, int], ...] = SQUARE
    cells: int = CELLS
    things: tuple[int, int] = (4, 9)
    radius: tuple[float, float] = (13.0, 18.0)
    draw: bool = True
    turns: tuple[tuple[str, int], ...] = ()
    broken: float = 0.0
    """Share of pictures whose string must run over the edge between two crops (of the others some do by chance)."""
    drop: Drop | None = None
    """How background tokens are dropped, newlines with them."""
    rounds: int = 1
    """How often every picture stands in a batch that drops tokens, each time with other questions and other tokens dropped."""


@dataclass
class TileBatch:
    """One batch.

    `pixels` (batch, tiles, height, width, 3); `tile_labels` (batch, tiles, labels, patches) and `presence` (batch,
    tiles, pairs and glyphs) as each tile shows them; `labels` (batch, labels, tokens) of the whole sequence, where a
    string counts on from crop to crop; `places` (batch, slots, tokens, 2) say where in the picture (0 to 1) the thing lies
    that a word names, nan where it names none or several. `kept` (batch, tokens) says which tokens are not dropped, and
    `compact` whether these are renumbered. Of several rounds all but the pixels and what tiles show is there.
    """

    grid: tuple[int, int]
    tile_labels: Tensor
    labels: Tensor
    presence: Tensor
    window: Tensor
    pixels: Tensor
    ids: Tensor
    targets: Tensor
    places: Tensor
    tasks: list[list[str]]
    kept: Tensor
    compact: bool


def make_batch(plan: TilePlan, prompts: Prompts, rng: np.random.Generator) -> TileBatch:
    """One batch of scenes of one size, with labels and, as the plan says, pixels and questions."""
    grid = plan.grids[rng.integers(len(plan.grids))]
    height, width = (PATCH_SIZE * plan.cells * crops for crops in grid)
    crops = grid[0] * grid[1]
    most = plan.things[1] if crops >= 4 else max(plan.things[0], plan.things[1] * crops // 4)
    least = min(plan.things[0], 3) if crops < 4 else plan.things[0]
    scenes = []
    for _ in range(plan.size):
        must_break = grid[1] > 1 and plan.broken > 0 and rng.random() < plan.broken
        while True:
            scene = make_scene(rng, width, (least, most), plan.radius, tall=height)
            if not must_break or is_broken(scene, PATCH_SIZE * plan.cells):
                break
        scenes.append(scene)
    pixels = torch.empty(0)
    if plan.draw:
        pixels = torch.stack([cut(decode_jpeg(encode_jpeg(render(scene)))) for scene in scenes])
    tile_labels = [
        np.concatenate([thumbnail_labels(scene, plan.cells)[None], cut_labels(raster_labels(scene), plan.cells)])
        for scene in scenes
    ]
    ids, targets, tasks = prompts.ask(scenes * plan.rounds, plan.turns, rng)
    asked = zip(scenes * plan.rounds, ids.tolist(), strict=True) if plan.turns else ()
    places = [[name_places(scene, slot, prompts) for slot in slots] for scene, slots in asked]
    window = tile_window(plan.cells, rng)
    whole = torch.from_numpy(np.stack([sequence_labels(scene, plan.cells) for scene in scenes] * plan.rounds))
    kept, compact = draw_kept(foreground(whole), plan.drop, rng)
    rows = rows_used(kept, plan.size)
    return TileBatch(
        grid=grid,
        tile_labels=torch.from_numpy(np.stack(tile_labels)).flatten(3),
        labels=whole[:rows],
        presence=torch.from_numpy(np.stack([tile_presence(tiles) for tiles in tile_labels])),
        window=window,
        pixels=pixels,
        ids=ids[:rows],
        targets=targets[:rows],
        places=torch.tensor(places[:rows]),
        tasks=tasks[:rows],
        kept=kept[:rows],
        compact=compact,
    )


def raster_labels(scene: Scene) -> np.ndarray:
    """`patch_labels` as (labels, rows, columns)."""
    return patch_labels(scene).reshape(-1, scene.height // PATCH_SIZE, scene.size // PATCH_SIZE)


def sequence_labels(scene: Scene, cells: int) -> np.ndarray:
    """Labels (labels, tokens) of the sequence of all tokens: the thumbnail's, then the crops' rows, nothing at newlines."""
    whole = np.pad(raster_labels(scene), ((0, 0), (0, 0), (0, 1)))
    return np.concatenate([thumbnail_labels(scene, cells).reshape(len(whole), -1), whole.reshape(len(whole), -1)], 1)


def is_broken(scene: Scene, tile: int) -> bool:
    """Whether the string runs over the edge between two crops side by side."""
    return scene.text_x // tile != (scene.text_x + GLYPH_SIZE * len(scene.text) - 1) // tile


def tile_window(cells: int, rng: np.random.Generator) -> Tensor:
    """Where a tile's patches lie on tiny-llava's grid; coarser tiles are spread over the same part of it."""
    step = CELLS // cells
    row, column = (FIRST + np.arange(cells) * step + int(rng.integers(step)) for _ in range(2))
    return torch.from_numpy((row[:, None] * GRID + column[None]).flatten())


def foreground_mask(scene: Scene) -> Tensor:
    """Which visual tokens of a scene's picture, newlines included, show a thing or a glyph, bool `[tokens]`."""
    return foreground(torch.from_numpy(sequence_labels(scene, CELLS))[None])[0]
