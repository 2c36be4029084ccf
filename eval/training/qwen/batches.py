"""Seeded batches of scenes of several sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.dropping import Drop, draw_kept, rows_used
from ..common.scenes import Scene, decode_jpeg, encode_jpeg, make_scene, render
from .labels import COVERED, scene_labels
from .model import TOKEN_SIZE
from .tokenizer import VisionPrompts


@dataclass(frozen=True)
class SizedPlan:
    """What a batch holds: about `tokens` visual tokens, all pictures of one of the sizes (rows, columns of tokens).

    `things` are the fewest and the most shapes in 144 tokens' space; smaller and larger pictures hold in proportion.
    """

    tokens: int
    sizes: tuple[tuple[int, int], ...]
    things: tuple[int, int] = (4, 9)
    draw: bool = True
    turns: tuple[tuple[str, int], ...] = ()
    drop: Drop | None = None
    """How background tokens are dropped; the kept ones always keep their position ids."""
    rounds: int = 1
    """How often every picture stands in a batch that drops tokens, each time with other questions and other tokens dropped."""


@dataclass
class SizedBatch:
    """Pixels (batch, height, width, 3), labels of patches and tokens, question slots; all pictures of one size.

    `kept` (batch, tokens) says which tokens are not dropped. Of several rounds only the first has pixels and labels.
    """

    size: tuple[int, int]
    patches: Tensor
    tokens: Tensor
    pixels: Tensor
    ids: Tensor
    targets: Tensor
    tasks: list[list[str]]
    kept: Tensor


def make_batch(plan: SizedPlan, prompts: VisionPrompts, rng: np.random.Generator) -> SizedBatch:
    """One batch of scenes with labels and, as the plan says, pixels and questions."""
    rows, columns = plan.sizes[rng.integers(len(plan.sizes))]
    space = rows * columns / 144
    fewest, most = (max(2, round(number * space)) for number in plan.things)
    scenes = [
        make_scene(rng, columns * TOKEN_SIZE, (fewest, most), tall=rows * TOKEN_SIZE)
        for _ in range(max(1, round(plan.tokens / (rows * columns))))
    ]
    pixels = torch.empty(0)
    if plan.draw:
        pixels = torch.from_numpy(np.stack([decode_jpeg(encode_jpeg(render(scene))) for scene in scenes]))
    ids, targets, tasks = prompts.ask(scenes * plan.rounds, plan.turns, rng)
    labels = [scene_labels(scene) for scene in scenes]
    tokens = torch.from_numpy(np.stack([tokens for _, tokens in labels]))
    kept, _ = draw_kept((tokens[:, COVERED] > 0).repeat(plan.rounds, 1), plan.drop, rng)
    used = rows_used(kept, len(scenes))
    return SizedBatch(
        size=(rows, columns),
        patches=torch.from_numpy(np.stack([patches for patches, _ in labels])),
        tokens=tokens,
        pixels=pixels,
        ids=ids[:used],
        targets=targets[:used],
        tasks=tasks[:used],
        kept=kept[:used],
    )


def foreground_mask(scene: Scene) -> Tensor:
    """Which visual tokens of a scene's picture show a thing or a glyph, bool `[tokens]`."""
    return torch.from_numpy(scene_labels(scene)[1][COVERED] > 0)
