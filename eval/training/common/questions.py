"""Questions and answers of the five tasks, made from a scene."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from .scenes import COLOUR_NAMES, MAX_COUNT, SHAPES, Scene

NUMBERS = ("zero", "one", "two", "three", "four")
RELATION_GAP = 20.0
"""Least distance in pixels, along the axis asked about, of the two things of a relation question."""


@dataclass(frozen=True)
class Question:
    """One question about a picture with its only right answer."""

    task: str
    text: str
    answer: str


def ask_attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Colour of a shape that occurs once (one of eight)."""
    things = scene.unique_shapes()
    if not things:
        return None
    thing = things[rng.integers(len(things))]
    return Question("attribute", f"what colour is the {SHAPES[thing.shape]}?", COLOUR_NAMES[thing.colour])


def ask_existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is there a thing of this colour and shape; when not, the colour and the shape both occur, but not together."""
    present = {(thing.shape, thing.colour) for thing in scene.things}
    if rng.integers(2):
        pairs, answer = sorted(present), "yes"
    else:
        shapes, colours = ({pair[i] for pair in present} for i in (0, 1))
        pairs, answer = sorted({(s, c) for s in shapes for c in colours} - present), "no"
    if not pairs:
        return None
    shape, colour = pairs[rng.integers(len(pairs))]
    return Question("existence", f"is there a {COLOUR_NAMES[colour]} {SHAPES[shape]}?", answer)


def ask_counting(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many things have the main shape (one to four) or, once in four times, another shape of the scene."""
    shape = scene.things[0].shape
    if rng.integers(4) == 0:
        shape = scene.things[rng.integers(len(scene.things))].shape
    count = scene.count(shape)
    if count > MAX_COUNT:
        return None
    return Question("counting", f"how many {plural(SHAPES[shape])}?", NUMBERS[count])


def ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Is one thing left of, or above, another (yes and no equally often)."""
    things = scene.unique_things()
    horizontal = bool(rng.integers(2))
    pairs = [(a, b) for a in things for b in things if (b.x - a.x if horizontal else b.y - a.y) > RELATION_GAP]
    if not pairs:
        return None
    first, second = pairs[rng.integers(len(pairs))]
    answer = "yes"
    if rng.integers(2):
        first, second, answer = second, first, "no"
    where = "left of" if horizontal else "above"
    return Question("relation", f"is the {first.name} {where} the {second.name}?", answer)


def ask_reading(scene: Scene, rng: np.random.Generator) -> Question:
    """The printed string (2 to 4 of 18 glyphs)."""
    return Question("reading", "what does the text say?", scene.text)


TASKS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "attribute": ask_attribute,
    "existence": ask_existence,
    "counting": ask_counting,
    "relation": ask_relation,
    "reading": ask_reading,
}


def ask_turns(scene: Scene, turns: Iterable[tuple[str, int]], rng: np.random.Generator) -> list[Question]:
    """Ask every task so many times; where a scene has no question for a task, about existence or what is printed."""
    return [
        TASKS[task](scene, rng) or ask_existence(scene, rng) or ask_reading(scene, rng)
        for task, times in turns
        for _ in range(times)
    ]


def plural(word: str) -> str:
    """`"circles"` for `"circle"`, `"crosses"` for `"cross"`."""
    return word + ("es" if word.endswith("s") else "s")
