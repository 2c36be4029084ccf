"""An endless, seeded stream of training batches, made by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..common.language import Prompts
from ..common.questions import ask_turns
from ..common.scenes import PATCH_SIZE, decode_jpeg, encode_jpeg, make_scene, patch_labels, presence, render
from ..common.tokenizer import build_tokenizer
from .tower import GRID, window_ids

AnyBatch = TypeVar("AnyBatch")

TEST_SEED = 20_000_000
"""Seeds from here on belong to the test set; training seeds stay far below."""


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
    ids: list[list[list[int]]] = []
    targets: list[list[list[int]]] = []
    tasks: list[list[str]] = []
    if plan.draw:
        pictures = [render(scene) for scene in scenes]
        if plan.jpeg:
            pictures = [decode_jpeg(encode_jpeg(picture)) for picture in pictures]
        pixels = torch.from_numpy(np.stack(pictures))
    if plan.turns:
        for scene in scenes:
            asked = ask_turns(scene, plan.turns, rng)
            slots = [prompts.slot(question.text, question.answer) for question in asked]
            ids.append([slot[0] for slot in slots])
            targets.append([slot[1] for slot in slots])
            tasks.append([question.task for question in asked])
    return Batch(
        labels=torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])),
        presence=torch.from_numpy(np.stack([presence(scene) for scene in scenes])),
        window=window_ids(canvas.cells, row, column),
        pixels=pixels,
        ids=torch.tensor(ids),
        targets=torch.tensor(targets),
        tasks=tasks,
    )


class BatchStream(IterableDataset[AnyBatch]):
    """What `make` draws as batches `start`, `start + 1`, ... of a seed; batch n is the same however the stream is cut."""

    def __init__(self, make: Callable[[np.random.Generator], AnyBatch], seed: int, start: int = 0) -> None:
        if seed >= TEST_SEED:
            raise ValueError(f"training seed {seed} is not below {TEST_SEED}")
        self.make, self.seed, self.start = make, seed, start

    def __iter__(self) -> Iterator[AnyBatch]:
        info = torch.utils.data.get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(self.start + number, 2**31, step):
            yield self.make(np.random.default_rng([self.seed, index]))


def stream_from(make: Callable[[np.random.Generator], AnyBatch], seed: int, start: int = 0) -> Iterator[AnyBatch]:
    """Iterate over a `BatchStream` in a worker process."""
    return iter(DataLoader(BatchStream(make, seed, start), batch_size=None, num_workers=1, prefetch_factor=4))


def stream(plan: BatchPlan, seed: int, start: int = 0) -> Iterator[Batch]:
    """The batches of a plan and a seed from number `start` on."""
    return stream_from(partial(make_batch, plan, Prompts(build_tokenizer())), seed, start)
