"""The vision tower: a small CLIP encoder with CLS, its dense training heads, and how it looks at smaller pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..common.losses import label_accuracy, label_loss
from ..common.scenes import IMAGE_SIZE, LABEL_SIZES, PATCH_SIZE, PRESENCE_SIZE

WIDTH = 128
FEATURE_LAYER = -2
GRID = IMAGE_SIZE // PATCH_SIZE


def tower_config() -> CLIPVisionConfig:
    """Six layers of width 128 over 24 x 24 patches; the sixth only serves the CLS token."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )


def window_ids(cells: int, row: int, column: int) -> Tensor:
    """Indices (reading order) of a window of the grid whose upper left patch is at row, column."""
    rows, columns = torch.arange(row, row + cells), torch.arange(column, column + cells)
    return (rows[:, None] * GRID + columns[None, :]).flatten()


@contextmanager
def looking_at(tower: CLIPVisionModel, window: Tensor) -> Iterator[None]:
    """Let the tower take pictures that are one window of its grid, with the window's position embeddings."""
    embeddings = tower.embeddings if hasattr(tower, "embeddings") else tower.vision_model.embeddings
    size, ids = embeddings.image_size, embeddings.position_ids
    embeddings.image_size = PATCH_SIZE * int(len(window) ** 0.5)
    embeddings.position_ids = torch.cat([torch.zeros(1, dtype=torch.long), window + 1])[None]
    try:
        yield
    finally:
        embeddings.image_size, embeddings.position_ids = size, ids


def normalise(pixels: Tensor) -> Tensor:
    """`uint8` pixels (batch, height, width, 3) as the processor would hand them to the tower."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


class TowerHeads(nn.Module):
    """Linear heads that only training uses: labels of each patch, and what the picture contains from the CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.patch = nn.Linear(WIDTH, sum(LABEL_SIZES.values()))
        self.presence = nn.Linear(WIDTH, PRESENCE_SIZE)
        self.presence_early = nn.Linear(WIDTH, PRESENCE_SIZE)

    def patch_logits(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits of every label (in the order of `LABEL_SIZES`) from patch features."""
        return self.patch(self.norm(features)).split(tuple(LABEL_SIZES.values()), dim=-1)

    def forward(self, hidden: Tensor, pooled: Tensor, labels: Tensor, presence: Tensor) -> dict[str, Tensor]:
        """Losses from the hidden states of the feature layer, the pooled CLS of the last layer, and the labels.

        `labels` is (batch, labels, patches). The CLS token of the feature layer is trained on the same target as the
        last layer's, so the attention it pays in both is a trained signal.
        """
        losses = {}
        for name, logits, target in zip(LABEL_SIZES, self.patch_logits(hidden[:, 1:]), labels.unbind(1), strict=True):
            losses[name] = label_loss(logits, target)
        losses["cls"] = 8 * F.binary_cross_entropy_with_logits(self.presence(pooled), presence)
        losses["cls_early"] = 4 * F.binary_cross_entropy_with_logits(self.presence_early(hidden[:, 0]), presence)
        return losses

    @torch.no_grad()
    def accuracy(self, hidden: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of the patches that hold something where each label is right."""
        parts = zip(LABEL_SIZES, self.patch_logits(hidden[:, 1:]), labels.unbind(1), strict=True)
        return {name: label_accuracy(logits, target) for name, logits, target in parts}
