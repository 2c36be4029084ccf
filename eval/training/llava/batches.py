"""Training batches of pictures of one size, or of windows of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.dropping import Drop, draw_kept, rows_used
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
    presence,
    render,
)
from .tower import GRID, window_ids


@dataclass(frozen=True)
class Canvas:
    """How large a training picture is and what it holds."""

    cells: int = GRID
    things: tuple[int, int] = (4, 7)
    radius: tuple[float, float] = (13.0, 18.0)


FULL = Canvas()
CROWDED = Canvas(10, (2, 3))
BUSY = Canvas(GRID, (4, 9))
DENSE = Canvas(GRID, (8, 12))
TOY = Canvas(8, (3, 6), (4.5, 6.5))
CROPPED = Canvas(16, (3, 5))
LARGER = Canvas(GRID, (3, 6), (15.0, 22.0))
SMALLER = Canvas(GRID, (4, 9), (11.0, 16.0))
MIXED = (FULL, BUSY, BUSY, LARGER, SMALLER, CROPPED)


@dataclass(frozen=True)
class BatchPlan:
    """What a batch holds: how many pictures of which canvas, drawn or labels only, and how often each task is asked."""

    size: int
    canvas: Canvas = FULL
    draw: bool = True
    jpeg: bool = True
    turns: tuple[tuple[str, int], ...] = ()
    canvases: tuple[Canvas, ...] = ()
    """What `canvas` is drawn from for each batch, if there are several."""
    drop: Drop | None = None
    """How background tokens are dropped."""
    rounds: int = 1
    """How often every picture stands in a batch that drops tokens, each time with other questions and other tokens dropped."""


@dataclass
class Batch:
    """`pixels` (batch, height, width, 3), labels, presence, questions in slots, and where the window lies.

    `places` (batch, slots, tokens, 2) say where the thing lies that a word names (`name_places`), `kept` (batch, patches)
    which patches' tokens are not dropped, and `compact` whether these are renumbered. All but `pixels` holds every picture as
    many times as the plan says. What the plan leaves out is empty.
    """

    labels: Tensor
    presence: Tensor
    window: Tensor
    pixels: Tensor
    ids: Tensor
    targets: Tensor
    tasks: list[list[str]]
    places: Tensor
    kept: Tensor
    compact: bool


def make_batch(plan: BatchPlan, prompts: Prompts, rng: np.random.Generator, test: bool = False) -> Batch:
    """One batch of scenes with labels and, as the plan says, pixels and questions."""
    canvas = plan.canvases[rng.integers(len(plan.canvases))] if plan.canvases else plan.canvas
    size = canvas.cells * PATCH_SIZE
    scenes = [make_scene(rng, size, canvas.things, canvas.radius, test) for _ in range(plan.size)]
    row, column = rng.integers(0, GRID - canvas.cells + 1, 2).tolist()
    pixels = torch.empty(0)
    if plan.draw:
        pictures = [render(scene) for scene in scenes]
        if plan.jpeg:
            pictures = [decode_jpeg(encode_jpeg(picture)) for picture in pictures]
        pixels = torch.from_numpy(np.stack(pictures))
    scenes = scenes * plan.rounds
    ids, targets, tasks = prompts.ask(scenes, plan.turns, rng)
    asked = zip(scenes, ids.tolist(), strict=True) if plan.turns else ()
    places = [[name_places(scene, slot, prompts) for slot in slots] for scene, slots in asked]
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
    kept, compact = draw_kept(foreground(labels), plan.drop, rng)
    rows = rows_used(kept, plan.size)
    return Batch(
        labels=labels[:rows],
        presence=torch.from_numpy(np.stack([presence(scene) for scene in scenes[:rows]])),
        window=window_ids(canvas.cells, row, column),
        pixels=pixels,
        ids=ids[:rows],
        targets=targets[:rows],
        tasks=tasks[:rows],
        places=torch.tensor(places[:rows]),
        kept=kept[:rows],
        compact=compact,
    )


def foreground_mask(scene: Scene) -> Tensor:
    """Which visual tokens of a scene's picture show a thing or a glyph, bool `[tokens]`."""
    return foreground(torch.from_numpy(patch_labels(scene))[None])[0]
