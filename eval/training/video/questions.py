"""Questions about clips: what moved, what came first or last, how many came, what a frame says, whether something happened."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..common.questions import NUMBERS, Question
from ..common.scenes import SHAPES
from .clips import Clip

WORDS = ("moved", "move", "came", "first", "last", "things", "appeared", "appear", "did")
"""Words that the pictures' questions do not have."""


def ask_motion(clip: Clip, rng: np.random.Generator) -> Question | None:
    """The shape of the thing that moved (one of six; of those in the clip, one of three or four)."""
    moving = [actor for actor in clip.actors if actor.moves]
    return Question("motion", "what moved?", SHAPES[moving[0].shape]) if moving else None


def ask_order(clip: Clip, rng: np.random.Generator) -> Question | None:
    """The shape of the thing that came first, or last, of two to four."""
    arrivals = clip.arrivals
    if len(arrivals) < 2:
        return None
    first = bool(rng.integers(2))
    wanted = arrivals[0 if first else -1]
    return Question("order", f"what came {'first' if first else 'last'}?", SHAPES[wanted.shape])


def ask_counting(clip: Clip, rng: np.random.Generator) -> Question | None:
    """How many things came (one to four); those that are there from the start do not count."""
    arrivals = len(clip.arrivals)
    return Question("counting", "how many things appeared?", NUMBERS[arrivals]) if arrivals else None


def ask_reading(clip: Clip, rng: np.random.Generator) -> Question:
    """The string that one frame shows (2 or 3 of 18 glyphs)."""
    return Question("reading", "what does the text say?", clip.text)


def ask_happened(clip: Clip, rng: np.random.Generator) -> Question | None:
    """Did a thing move, or come (yes and no equally often); when not, it was there all the same, where the clip has one."""
    yes = bool(rng.integers(2))
    if clip.kind == "motion":
        shapes = [actor.shape for actor in clip.actors if actor.moves == yes]
        what = "move"
    else:
        shapes = [actor.shape for actor in clip.actors if (actor.first > 0) == yes]
        what = "appear"
    if not shapes:
        shapes = sorted(set(range(len(SHAPES))) - {actor.shape for actor in clip.actors})
    shape = SHAPES[shapes[rng.integers(len(shapes))]]
    return Question("happened", f"did the {shape} {what}?", "yes" if yes else "no")


CLIP_TASKS: dict[str, Callable[[Clip, np.random.Generator], Question | None]] = {
    "motion": ask_motion,
    "order": ask_order,
    "counting": ask_counting,
    "reading": ask_reading,
    "happened": ask_happened,
}


def ask_clip(clip: Clip, rng: np.random.Generator) -> list[Question]:
    """Six questions for training: of each that the clip has one, whether something happened several times."""
    asks = (ask_motion, ask_order, ask_counting, ask_reading, ask_happened, ask_order, ask_happened)
    found = [question for ask in asks if (question := ask(clip, rng)) is not None]
    while len(found) < 6:
        found.append(ask_happened(clip, rng) or ask_reading(clip, rng))
    return found[:6]
