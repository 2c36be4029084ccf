"""Procedural clips: coloured shapes that move, come and go on a textured ground, with one string printed in a single frame.

A clip is a run of moments, two frames each (what Qwen's towers merge to one slice). Between events nothing changes, so
neighbouring moments are often identical; one clip in two has a cut, where the ground changes and the things go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.glyphs import GLYPH_SIZE
from ..common.scenes import (
    COLOURS,
    MAX_COUNT,
    PATCH_SIZE,
    SHAPES,
    Scene,
    Thing,
    draw_background,
    draw_text,
    draw_thing,
    make_string,
)

SIZE = 80
"""Side of a frame in pixels."""
FRAMES = 2
"""Frames of a moment."""
MOMENTS = (4, 8)
CELLS = 3
"""Things lie in a grid of so many rows and columns of cells, so that none covers another."""
RADIUS = (9.5, 12.0)
LONGEST_STRING = 3
KINDS = ("motion", "arrivals")

Place = tuple[float, float]


@dataclass(frozen=True)
class Actor:
    """A thing of a clip: shape and colour as in `Thing`, a tint, and its centre at every moment, None while it is not there."""

    shape: int
    colour: int
    radius: float
    tint: tuple[float, float, float]
    places: tuple[Place | None, ...]

    @property
    def first(self) -> int:
        """The moment at which it is there first."""
        return next(moment for moment, place in enumerate(self.places) if place is not None)

    @property
    def moves(self) -> bool:
        """Whether it is ever somewhere else than where it was first."""
        return len({place for place in self.places if place is not None}) > 1

    def moved(self, moment: int) -> bool:
        """Whether it is somewhere else at a moment than where it was first."""
        return self.places[moment] not in (None, self.places[self.first])


@dataclass(frozen=True)
class Clip:
    """What a clip shows.

    Attributes:
        kind: "motion" (one thing moves) or "arrivals" (things come one after the other, some leave).
        actors: the things, each of another shape.
        grounds: seed of the ground's texture at every moment.
        text: the printed string.
        text_at: upper left corner of its first glyph's cell.
        text_frame: the frame that shows it.
        light_ink: whether it is printed in light ink.
    """

    kind: str
    actors: tuple[Actor, ...]
    grounds: tuple[int, ...]
    text: str
    text_at: tuple[int, int]
    text_frame: int
    light_ink: bool

    @property
    def moments(self) -> int:
        """Number of moments."""
        return len(self.grounds)

    @property
    def arrivals(self) -> list[Actor]:
        """The things that are not there from the start, in the order in which they come."""
        return sorted((actor for actor in self.actors if actor.first), key=lambda actor: actor.first)

    def scene(self, moment: int, text: bool) -> Scene:
        """What is to be seen at a moment, with or without the string."""
        things = tuple(
            Thing(actor.shape, actor.colour, *place, actor.radius)
            for actor in self.actors
            if (place := actor.places[moment]) is not None
        )
        x, y = self.text_at
        return Scene(SIZE, things, self.text if text else "", x, y, self.light_ink, self.grounds[moment])

    def frame_keys(self) -> list[tuple[object, ...]]:
        """For every frame what decides how it looks: frames with equal keys are the same picture."""
        return [
            (*(actor.places[frame // FRAMES] for actor in self.actors), self.grounds[frame // FRAMES], frame == self.text_frame)
            for frame in range(FRAMES * self.moments)
        ]  # fmt: skip


def make_clip(rng: np.random.Generator, kind: str, moments: int, test: bool = False) -> Clip:
    """Draw one clip of a kind; `test` takes its string from those that no training clip or picture shows."""
    while True:
        actors = _motion(rng, moments) if kind == "motion" else _arrivals(rng, moments)
        text = make_string(rng, test, LONGEST_STRING)
        spot = _free_spot(rng, actors, moments, text)
        if spot is None:
            continue
        moment, at = spot
        seeds = rng.integers(2**31, size=2)
        cut = int(rng.integers(1, moments)) if rng.integers(2) else moments
        grounds = tuple(int(seeds[int(number >= cut)]) for number in range(moments))
        frame = FRAMES * moment + int(rng.integers(FRAMES))
        return Clip(kind, tuple(actors), grounds, text, at, frame, bool(rng.integers(2)))


def _actors(rng: np.random.Generator, tracks: Sequence[Sequence[int | None]]) -> list[Actor]:
    """Things of different shapes on tracks of cells (None while not there)."""
    step = SIZE / CELLS
    order = rng.permutation(len(SHAPES))
    actors = []
    for shape, track in zip(order, tracks, strict=False):
        radius = float(rng.uniform(*RADIUS))
        off = rng.uniform(-1, 1, 2) * (step / 2 - radius - 0.5)
        places = tuple(
            None
            if cell is None
            else (float((cell % CELLS + 0.5) * step + off[0]), float((cell // CELLS + 0.5) * step + off[1]))
            for cell in track
        )
        red, green, blue = (float(value) for value in rng.uniform(-12, 12, 3))
        actors.append(Actor(int(shape), int(rng.integers(len(COLOURS))), radius, (red, green, blue), places))
    return actors


def _motion(rng: np.random.Generator, moments: int) -> list[Actor]:
    """Three or four things of which one goes to neighbouring cells, one to three times."""
    cells = [int(cell) for cell in rng.permutation(CELLS**2)]
    still = [cells.pop() for _ in range(int(rng.integers(2, 4)))]
    steps = set(rng.choice(np.arange(1, moments), min(int(rng.integers(1, 4)), moments - 1), replace=False).tolist())
    at = cells.pop()
    track: list[int] = []
    for moment in range(moments):
        if moment in steps:
            near = [cell for cell in _neighbours(at) if cell not in still and cell != track[0]]
            at = near[rng.integers(len(near))] if near else at
        track.append(at)
    tracks = [[cell] * moments for cell in still]
    if len(set(track)) == 1:
        return _motion(rng, moments)
    return _actors(rng, [track, *tracks])


def _neighbours(cell: int) -> list[int]:
    row, column = divmod(cell, CELLS)
    near = [(row + down, column + along) for down in (-1, 0, 1) for along in (-1, 0, 1) if down or along]
    return [r * CELLS + c for r, c in near if 0 <= r < CELLS and 0 <= c < CELLS]


def _arrivals(rng: np.random.Generator, moments: int) -> list[Actor]:
    """One to four things that come at different moments, and up to two that are there from the start; some leave."""
    comers, starters = int(rng.integers(1, MAX_COUNT + 1)), int(rng.integers(0, 3))
    comers = min(comers, moments - 1)
    starters = min(starters, 5 - comers)
    cells = [int(cell) for cell in rng.permutation(CELLS**2)]
    times = [0] * starters + sorted(rng.choice(np.arange(1, moments), comers, replace=False).tolist())
    tracks: list[list[int | None]] = []
    for come in times:
        leave = moments
        if rng.random() < 0.4 and come + 1 < moments:
            leave = int(rng.integers(come + 1, moments))
        cell = cells.pop()
        tracks.append([cell if come <= moment < leave else None for moment in range(moments)])
    return _actors(rng, [tracks[i] for i in rng.permutation(len(tracks))])


def _free_spot(
    rng: np.random.Generator, actors: list[Actor], moments: int, text: str
) -> tuple[int, tuple[int, int]] | None:
    """A moment, and a place where the string covers nothing then."""
    width = GLYPH_SIZE * len(text)
    for _ in range(40):
        moment = int(rng.integers(moments))
        x = PATCH_SIZE * int(rng.integers(0, (SIZE - width) // PATCH_SIZE + 1))
        y = PATCH_SIZE * int(rng.integers(0, (SIZE - GLYPH_SIZE) // PATCH_SIZE + 1))
        if all(_apart(actor, moment, (x, y, x + width, y + GLYPH_SIZE)) for actor in actors):
            return moment, (x, y)
    return None


def _apart(actor: Actor, moment: int, box: tuple[int, int, int, int]) -> bool:
    place = actor.places[moment]
    if place is None:
        return True
    dx = max(box[0] - place[0], place[0] - box[2], 0.0)
    dy = max(box[1] - place[1], place[1] - box[3], 0.0)
    return dx * dx + dy * dy >= (actor.radius + 1) ** 2


def render_frame(clip: Clip, frame: int) -> np.ndarray:
    """Draw one frame: `uint8` array of height, width, 3."""
    moment = frame // FRAMES
    scene = clip.scene(moment, text=frame == clip.text_frame)
    image = draw_background(np.random.default_rng(scene.texture_seed), SIZE, SIZE)
    there = [actor for actor in clip.actors if actor.places[moment] is not None]
    for thing, actor in zip(scene.things, there, strict=True):
        draw_thing(image, thing, np.array(actor.tint))
    draw_text(image, scene)
    return np.clip(image, 0, 255).astype(np.uint8)


def render_clip(clip: Clip) -> tuple[list[np.ndarray], list[int]]:
    """The different frames of a clip, and for every frame which of them it is."""
    numbers: dict[tuple[object, ...], int] = {}
    pictures: list[np.ndarray] = []
    order: list[int] = []
    for frame, key in enumerate(clip.frame_keys()):
        if key not in numbers:
            numbers[key] = len(pictures)
            pictures.append(render_frame(clip, frame))
        order.append(numbers[key])
    return pictures, order
