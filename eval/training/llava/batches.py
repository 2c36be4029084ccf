"""Training batches of pictures of one size, or of windows of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.language import Prompts
from ..common.scenes import PATCH_SIZE, decode_jpeg, encode_jpeg, make_scene, patch_labels, presence, render
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


@dataclass(frozen=True)
class BatchPlan:
    """What a batch holds: how many pictures of which canvas, drawn or labels only, and how often each task is asked."""

    size: int
    canvas: Canvas = FULL
    draw: bool = True
    jpeg: bool = True
    turns: tuple[tuple[str, int], ...] = ()


@dataclass
class Batch:
    """`pixels` (batch, height, width, 3), labels, presence, questions in slots, and where the window lies.

    What the plan leaves out is empty.
    """

    labels: Tensor
    presence: Tensor
    window: Tensor
    pixels: Tensor
    ids: Tensor
    targets: Tensor
    tasks: list[list[str]]


def make_batch(plan: BatchPlan, prompts: Prompts, rng: np.random.Generator, test: bool = False) -> Batch:
    """One batch of scenes with labels and, as the plan says, pixels and questions."""
    canvas = plan.canvas
    size = canvas.cells * PATCH_SIZE
    scenes = [make_scene(rng, size, canvas.things, canvas.radius, test) for _ in range(plan.size)]
    row, column = rng.integers(0, GRID - canvas.cells + 1, 2).tolist()
    pixels = torch.empty(0)
    if plan.draw:
        pictures = [render(scene) for scene in scenes]
        if plan.jpeg:
            pictures = [decode_jpeg(encode_jpeg(picture)) for picture in pictures]
        pixels = torch.from_numpy(np.stack(pictures))
    ids, targets, tasks = prompts.ask(scenes, plan.turns, rng)
    return Batch(
        labels=torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])),
        presence=torch.from_numpy(np.stack([presence(scene) for scene in scenes])),
        window=window_ids(canvas.cells, row, column),
        pixels=pixels,
        ids=ids,
        targets=targets,
        tasks=tasks,
    )
