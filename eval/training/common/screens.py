"""Screens: the things and the string of a scene on flat panels, as in a screenshot; most of a picture is one colour.

Drawn without texture, grain or JPEG, so that neighbouring patches are equal to the last bit wherever nothing is drawn.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from .glyphs import GLYPH_SIZE, GLYPHS
from .scenes import COLOUR_NAMES, COLOURS, Scene, signed_distance

PANELS = 2


def render_screen(scene: Scene) -> np.ndarray:
    """Draw a scene on a title bar and panels: `uint8` array of height, width, 3."""
    rng = np.random.default_rng(scene.texture_seed)
    width, height = scene.size, scene.height
    ground = np.round(rng.uniform(80, 155) + rng.uniform(-18, 18, 3)).astype(np.float32)
    image = np.tile(ground, (height, width, 1))
    for _ in range(PANELS):
        left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
        right, bottom = left + int(rng.integers(40, width // 2 + 40)), top + int(rng.integers(30, height // 2 + 30))
        image[top:bottom, left:right] = np.round(ground + rng.uniform(-18, 18))
    image[: int(rng.integers(8, 14))] = np.round(ground + rng.uniform(-30, 30))
    for thing in scene.things:
        reach = int(thing.radius * 1.15) + 2
        x0, y0 = max(int(thing.x) - reach, 0), max(int(thing.y) - reach, 0)
        x1, y1 = min(int(thing.x) + reach + 1, width), min(int(thing.y) + reach + 1, height)
        along, down = np.arange(x0, x1) + 0.5 - thing.x, np.arange(y0, y1) + 0.5 - thing.y
        distance = signed_distance(thing.shape, along[None, :], down[:, None], thing.radius)
        cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)[:, :, None]
        image[y0:y1, x0:x1] += cover * (np.array(COLOURS[COLOUR_NAMES[thing.colour]], np.float32) - image[y0:y1, x0:x1])
    ink = 245.0 if scene.light_ink else 10.0
    for number, glyph in enumerate(scene.text):
        x = scene.text_x + number * GLYPH_SIZE
        image[scene.text_y : scene.text_y + GLYPH_SIZE, x : x + GLYPH_SIZE][GLYPHS[glyph]] = ink
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    """The bytes that the test set stores: nothing is lost."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
