"""What each visual token (2 x 2 patches) and each patch of a scene shows."""

from __future__ import annotations

import numpy as np

from ..common.glyphs import GLYPH_SIZE
from ..common.scenes import LABEL_SIZES, PATCH_SIZE, Scene, patch_labels
from .model import MERGE

PATCH_LABELS: dict[str, int] = {**LABEL_SIZES, "quarter": 5}
"""Classes of each label of a patch; `quarter` tells which corner of its glyph a patch holds (0: no glyph)."""
TOKEN_LABELS: dict[str, int] = {**LABEL_SIZES, "covered": 2}
"""Classes of each label of a visual token; a glyph belongs to the token that holds its upper left patch."""
COVERED = list(TOKEN_LABELS).index("covered")


def scene_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the patches, `int64` (labels, tokens, patches of a token), and of the tokens (labels, tokens).

    Labels stand in the order of `PATCH_LABELS` and `TOKEN_LABELS`; tokens and the patches in them in reading order.
    """
    rows, columns = scene.height // PATCH_SIZE, scene.size // PATCH_SIZE
    patches = np.zeros((len(PATCH_LABELS), rows, columns), np.int64)
    patches[:-1] = patch_labels(scene).reshape(-1, rows, columns)
    top, left = scene.text_y // PATCH_SIZE, scene.text_x // PATCH_SIZE
    span = GLYPH_SIZE // PATCH_SIZE
    width = span * len(scene.text)
    patches[-1, top : top + span, left : left + width] = 1 + np.tile([[0, 1], [2, 3]], (1, len(scene.text)))
    parts = patches.reshape(len(patches), rows // MERGE, MERGE, columns // MERGE, MERGE).transpose(0, 1, 3, 2, 4)
    parts = parts.reshape(len(patches), -1, MERGE**2)
    shape, centre, quarter = parts[0], parts[4], parts[5]
    tokens = np.zeros((len(TOKEN_LABELS), parts.shape[1]), np.int64)
    thing = np.argmax((shape > 0) + 2 * centre, axis=1)[:, None]
    glyph = np.argmax(quarter == 1, axis=1)[:, None]
    owns = (quarter == 1).any(axis=1)
    for i in (0, 1):
        tokens[i] = np.take_along_axis(parts[i], thing, 1)[:, 0]
    for i in (2, 3):
        tokens[i] = np.take_along_axis(parts[i], glyph, 1)[:, 0] * owns
    tokens[4] = centre.max(axis=1)
    tokens[5] = ((shape > 0) | (quarter > 0)).any(axis=1)
    return parts, tokens
