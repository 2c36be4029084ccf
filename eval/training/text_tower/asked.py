"""Which patches a question or caption asks for."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from ..common.questions import TASKS, plural
from ..common.scenes import COLOUR_NAMES, SHAPES, Scene

_SHAPE_OF = {word: index for index, shape in enumerate(SHAPES) for word in (shape, plural(shape))}
_NAMED = re.compile(rf"(?:({'|'.join(COLOUR_NAMES)}) )?\b({'|'.join(sorted(_SHAPE_OF, key=len, reverse=True))})\b")


def ask_or_name(scene: Scene, rng: np.random.Generator) -> str:
    """A question of one of the five tasks about a scene or, once in six times, just the name of one of its things."""
    tasks = list(TASKS.values())
    task = int(rng.integers(len(tasks) + 1))
    question = tasks[task](scene, rng) if task < len(tasks) else None
    return question.text if question else scene.things[rng.integers(len(scene.things))].name


def asked_patches(text: str, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tiles show what a text asks for.

    Args:
        text: a question or a name.
        labels: int64 `[tiles, labels, patches]`, as `patch_labels` makes them.

    Returns:
        The patches that show it, bool `[tiles, patches]`, and the tiles that show all that it names, bool `[tiles]`.
    """
    things = _NAMED.findall(text)
    if not things:
        printed = labels[:, 2] > 0
        return printed, printed.any(-1)
    masks = []
    for colour, shape in things:
        fits = labels[:, 0] == _SHAPE_OF[shape] + 1
        masks.append(fits & (labels[:, 1] == COLOUR_NAMES.index(colour) + 1) if colour else fits)
    stacked = torch.stack(masks)
    return stacked.any(0), stacked.any(-1).all(0)
