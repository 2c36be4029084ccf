"""What the frozen vision tower of a shipped model makes of training pictures, kept for all steps of the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.scenes import PATCH_SIZE, Scene, decode_jpeg, encode_jpeg, make_scene, patch_labels, render
from ..common.stream import TEST_SEED
from ..llava.tower import normalise
from ..next.tiles import CELLS, cut, cut_labels, thumbnail_labels

FIRST_SEED = 9_000_000
BATCH = 8

Tiles = tuple[Tensor, np.ndarray]


def one_tile(picture: np.ndarray, scene: Scene) -> Tiles:
    """The picture as it is, with its labels."""
    return torch.from_numpy(picture.copy())[None], patch_labels(scene)[None]


def thumbnail_and_crops(picture: np.ndarray, scene: Scene) -> Tiles:
    """The picture squeezed in a tile, and cut into four, each with its labels."""
    side = scene.size // PATCH_SIZE
    whole = patch_labels(scene).reshape(-1, side, side)
    labels = np.concatenate([thumbnail_labels(scene, CELLS)[None], cut_labels(whole, CELLS)])
    return cut(picture), labels.reshape(len(labels), labels.shape[1], -1)


TILES: dict[str, Callable[[np.ndarray, Scene], Tiles]] = {
    "tiny-llava": one_tile,
    "tiny-llava-next": thumbnail_and_crops,
}
"""How each of the models with a CLIP tower looks at a picture."""


@dataclass
class SeenPictures:
    """`states` fp16 `[tiles, 2, 1 + patches, width]` of the feature layer and the last, `labels` `[tiles, labels, patches]`.

    `scenes` has the scene of every tile.
    """

    states: Tensor
    labels: Tensor
    scenes: list[Scene]


@torch.inference_mode()
def see(tower: Any, name: str, pictures: int, feature_layer: int) -> SeenPictures:
    """Draw training pictures and show them to the tower.

    Args:
        tower: a CLIP vision tower.
        name: the shipped model that it is of.
        pictures: how many.
        feature_layer: index into the tower's hidden states, -2 say.
    """
    tiles_of = TILES[name]
    if FIRST_SEED + pictures >= TEST_SEED:
        raise ValueError(f"{pictures} pictures reach the seeds of the test set; at most {TEST_SEED - FIRST_SEED - 1}")
    states, labels, scenes = [], [], []
    for number in range(pictures):
        scene = make_scene(np.random.default_rng(FIRST_SEED + number))
        pixels, marks = tiles_of(decode_jpeg(encode_jpeg(render(scene))), scene)
        hidden = tower(normalise(pixels), output_hidden_states=True).hidden_states
        states.append(torch.stack([hidden[feature_layer], hidden[-1]], 1).half())
        labels.append(torch.from_numpy(marks))
        scenes += [scene] * len(pixels)
    return SeenPictures(torch.cat(states).clone(), torch.cat(labels), scenes)
