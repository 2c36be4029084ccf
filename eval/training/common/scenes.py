"""Procedural scenes: coloured shapes and one printed string on a textured background, with labels for every patch.

A scene is plain data made from a seeded generator. `render` draws it with numpy alone (no font, no drawing library), so
every machine draws the same picture; `patch_labels` tells what each patch shows and `presence` what the picture contains.
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from torch import Tensor

from .glyphs import GLYPH_SIZE, GLYPHS

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (240, 220, 40),
    "purple": (120, 35, 150),
    "orange": (245, 135, 25),
    "cyan": (60, 215, 225),
    "pink": (250, 150, 195),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
ALPHABET = "".join(GLYPHS)
IMAGE_SIZE = 192
PATCH_SIZE = 8
MAX_STRING = 4
MAX_COUNT = 4
JPEG_QUALITY = 85
TEST_SHARE = 10
"""One string in `TEST_SHARE` is kept for the test set and never printed in a training picture."""


@dataclass(frozen=True)
class Thing:
    """One coloured shape: indices into `SHAPES` and `COLOUR_NAMES`, its centre and its half size in pixels."""

    shape: int
    colour: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape as words, `"red circle"`."""
        return f"{COLOUR_NAMES[self.colour]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `text_x` and `text_y` are the upper left corner of the first glyph's cell.

    `size` is the picture's width and, where `tall` is 0, also its height.
    """

    size: int
    things: tuple[Thing, ...]
    text: str
    text_x: int
    text_y: int
    light_ink: bool
    texture_seed: int
    tall: int = 0

    @property
    def height(self) -> int:
        """Height of the picture in pixels."""
        return self.tall or self.size

    def count(self, shape: int) -> int:
        """How many things have this shape."""
        return sum(thing.shape == shape for thing in self.things)

    def unique_shapes(self) -> list[Thing]:
        """The things whose shape no other thing has."""
        shapes = Counter(thing.shape for thing in self.things)
        return [thing for thing in self.things if shapes[thing.shape] == 1]

    def unique_things(self) -> list[Thing]:
        """The things whose pair of shape and colour no other thing has."""
        pairs = Counter((thing.shape, thing.colour) for thing in self.things)
        return [thing for thing in self.things if pairs[thing.shape, thing.colour] == 1]


def is_test_string(text: str) -> bool:
    """Whether a printed string belongs to the test set (decided by its checksum, so the two sets never share one)."""
    return zlib.crc32(text.encode()) % TEST_SHARE == 0


def make_string(rng: np.random.Generator, test: bool, longest: int = MAX_STRING) -> str:
    """A random string of 2 to `longest` glyphs from the training or the test half of all strings."""
    while True:
        length = int(rng.integers(2, longest + 1))
        text = "".join(ALPHABET[i] for i in rng.integers(0, len(ALPHABET), length))
        if is_test_string(text) == test:
            return text


def make_scene(
    rng: np.random.Generator,
    size: int = IMAGE_SIZE,
    things: tuple[int, int] = (4, 7),
    radius: tuple[float, float] = (13.0, 18.0),
    test: bool = False,
    tall: int = 0,
) -> Scene:
    """Draw one scene: a main shape that occurs one to four times, one shape that occurs once, others at random.

    `tall` is the height in pixels of a picture that is not square (0: as high as it is wide).
    """
    while True:
        shapes = _choose_shapes(rng, int(rng.integers(things[0], things[1] + 1)))
        text = make_string(rng, test)
        cells = size // PATCH_SIZE
        text_x = PATCH_SIZE * int(rng.integers(0, cells - 2 * len(text) + 1))
        text_y = PATCH_SIZE * int(rng.integers(0, (tall or size) // PATCH_SIZE - 1))
        box = (text_x, text_y, text_x + GLYPH_SIZE * len(text), text_y + GLYPH_SIZE)
        placed = _place(rng, (size, tall or size), shapes, radius, box)
        if placed is not None:
            return Scene(size, placed, text, text_x, text_y, bool(rng.integers(2)), int(rng.integers(2**31)), tall)


def _choose_shapes(rng: np.random.Generator, total: int) -> list[int]:
    order = rng.permutation(len(SHAPES))
    repeats = int(rng.integers(1, min(MAX_COUNT, total - 1) + 1))
    shapes = [int(order[0])] * repeats + [int(order[1])]
    while len(shapes) < total:
        shapes.append(int(order[rng.integers(2, len(SHAPES))]))
    return shapes


def _place(
    rng: np.random.Generator,
    size: tuple[int, int],
    shapes: list[int],
    radius: tuple[float, float],
    box: tuple[int, int, int, int],
) -> tuple[Thing, ...] | None:
    placed: list[Thing] = []
    for shape in shapes:
        for _ in range(40):
            r, x, y = rng.random(3)
            r = radius[0] + r * (radius[1] - radius[0])
            x, y = r + x * (size[0] - 2 * r), r + y * (size[1] - 2 * r)
            dx, dy = max(box[0] - x, x - box[2], 0.0), max(box[1] - y, y - box[3], 0.0)
            if dx * dx + dy * dy < (r + 2) ** 2:
                continue
            if all((x - o.x) ** 2 + (y - o.y) ** 2 > (r + o.radius + 2) ** 2 for o in placed):
                placed.append(Thing(shape, int(rng.integers(len(COLOURS))), x, y, r))
                break
        else:
            return None
    return tuple(placed)


def signed_distance(shape: int, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) of points relative to the centre of a shape."""
    name = SHAPES[shape]
    ax, ay = np.abs(x), np.abs(y)
    if name == "circle":
        return np.hypot(x, y) - radius
    if name == "square":
        return np.maximum(ax, ay) - 0.88 * radius
    if name == "triangle":
        return np.maximum(y - 0.75 * radius, (1.75 * ax - (y + radius)) / 2.016)
    if name == "cross":
        bar = 0.34 * radius
        return np.minimum(np.maximum(ax - bar, ay - radius), np.maximum(ax - radius, ay - bar))
    if name == "ring":
        return np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius
    return (ax + ay - 1.1 * radius) * 0.7071


@lru_cache(maxsize=8)
def _blend(size: int, knots: int) -> np.ndarray:
    """Matrix that interpolates `knots` values linearly to `size` values."""
    at = np.linspace(0, knots - 1, size)
    low = np.minimum(at.astype(int), knots - 2)
    matrix = np.zeros((size, knots), np.float32)
    matrix[np.arange(size), low] = 1 - (at - low)
    matrix[np.arange(size), low + 1] = at - low
    return matrix


def draw_background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Uneven grey-brown ground with stripes, grain and confetti in the colours of the things."""
    light = _blend(height, 5) @ rng.uniform(70, 165, (5, 5)).astype(np.float32) @ _blend(width, 5).T
    tint = rng.uniform(-18, 18, 3).astype(np.float32)
    down, along = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None, :]
    fx, fy = rng.uniform(-0.5, 0.5, 2)
    light += np.float32(rng.uniform(0, 14)) * np.sin(down * fy + along * fx).astype(np.float32)
    image = light[:, :, None] + tint
    image += rng.integers(-10, 11, (height, width, 1), dtype=np.int8)
    palette = np.array([*COLOURS.values(), (240, 240, 240), (15, 15, 15)], np.float32)
    dots = width * height // 1200
    for x, y, w, c in zip(
        *rng.integers(0, (width - 3, height - 3, 2, len(palette)), (dots, 4)).T.tolist(), strict=True
    ):
        image[y : y + 2 + w, x : x + 3 - w] = palette[c]
    return image


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: `uint8` array of height, width, 3."""
    rng = np.random.default_rng(scene.texture_seed)
    image = draw_background(rng, scene.size, scene.height)
    for thing in scene.things:
        draw_thing(image, thing, rng.uniform(-12, 12, 3))
    draw_text(image, scene)
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_thing(image: np.ndarray, thing: Thing, tint: np.ndarray) -> None:
    """Draw a thing on a picture (height, width, 3) in place; `tint` (3) is added to its colour."""
    height, width = image.shape[:2]
    reach = int(thing.radius * 1.15) + 2
    x0, y0 = max(int(thing.x) - reach, 0), max(int(thing.y) - reach, 0)
    x1, y1 = min(int(thing.x) + reach + 1, width), min(int(thing.y) + reach + 1, height)
    gx, gy = np.arange(x0, x1) + 0.5 - thing.x, np.arange(y0, y1) + 0.5 - thing.y
    distance = signed_distance(thing.shape, gx[None, :], gy[:, None], thing.radius)
    cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)[:, :, None]
    colour = np.array(COLOURS[COLOUR_NAMES[thing.colour]], np.float32) + tint.astype(np.float32)
    image[y0:y1, x0:x1] += cover * (colour - image[y0:y1, x0:x1])


def draw_text(image: np.ndarray, scene: Scene) -> None:
    """Print a scene's string on a picture (height, width, 3) in place."""
    ink = 245.0 if scene.light_ink else 10.0
    for i, glyph in enumerate(scene.text):
        x = scene.text_x + i * GLYPH_SIZE
        cell = image[scene.text_y : scene.text_y + GLYPH_SIZE, x : x + GLYPH_SIZE]
        cell[GLYPHS[glyph]] = ink


def encode_jpeg(image: np.ndarray) -> bytes:
    """The bytes that the test set stores."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> np.ndarray:
    """The picture that stored bytes hold, as `uint8` array of height, width, 3."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


LABEL_SIZES: dict[str, int] = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "glyph": len(ALPHABET) + 1,
    "order": MAX_STRING + 1,
    "centre": 2,
}
"""Number of classes of each label of a patch; class 0 means "nothing of this kind here"."""


def patch_labels(scene: Scene) -> np.ndarray:
    """What each patch shows: `int64` array (labels in the order of `LABEL_SIZES`, patches in reading order)."""
    labels = np.zeros((len(LABEL_SIZES), scene.height // PATCH_SIZE, scene.size // PATCH_SIZE), np.int64)
    down, along = ((np.arange(cells) + 0.5) * PATCH_SIZE for cells in labels.shape[1:])
    for thing in scene.things:
        inside = signed_distance(thing.shape, along[None, :] - thing.x, down[:, None] - thing.y, thing.radius) < 1.5
        row, column = int(thing.y) // PATCH_SIZE, int(thing.x) // PATCH_SIZE
        inside[row, column] = True
        labels[0][inside] = thing.shape + 1
        labels[1][inside] = thing.colour + 1
        labels[4][row, column] = 1
    row, span = scene.text_y // PATCH_SIZE, GLYPH_SIZE // PATCH_SIZE
    for i, glyph in enumerate(scene.text):
        column = scene.text_x // PATCH_SIZE + i * span
        labels[2, row : row + span, column : column + span] = ALPHABET.index(glyph) + 1
        labels[3, row : row + span, column : column + span] = i + 1
    return labels.reshape(len(LABEL_SIZES), -1)


def foreground(labels: Tensor) -> Tensor:
    """Which patches or tokens show a thing or a glyph, bool `[batch, patches]`, from labels `[batch, labels, patches]`."""
    return (labels[:, 0] > 0) | (labels[:, 2] > 0)


PRESENCE_SIZE = len(SHAPES) * len(COLOURS) + len(ALPHABET)


def presence(scene: Scene) -> np.ndarray:
    """Which pairs of shape and colour and which glyphs the picture contains: multi-hot vector, target of the CLS token."""
    hot = np.zeros(PRESENCE_SIZE, np.float32)
    for thing in scene.things:
        hot[thing.shape * len(COLOURS) + thing.colour] = 1
    for glyph in scene.text:
        hot[len(SHAPES) * len(COLOURS) + ALPHABET.index(glyph)] = 1
    return hot
