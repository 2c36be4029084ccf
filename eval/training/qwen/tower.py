"""What the tower learns from: labels of its patches and of the merger's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_window_index

from ..common.language import WIDTH
from ..common.losses import label_accuracy, label_loss
from ..common.scenes import LABEL_SIZES, PATCH_SIZE
from .labels import PATCH_LABELS
from .model import MERGE


def pack(pixels: Tensor) -> Tensor:
    """`uint8` pixels as the processor would hand them to the tower: (patches, 384).

    They are those of pictures (batch, height, width, 3) or of slices of a video (batch, 2, height, width, 3).
    """
    if pixels.ndim == 4:
        pixels = pixels[:, None].expand(-1, 2, -1, -1, -1)
    batch, frames, height, width, _ = pixels.shape
    span = MERGE * PATCH_SIZE
    values = (pixels.float() / 255 - 0.5) / 0.5
    values = values.reshape(batch, frames, height // span, MERGE, PATCH_SIZE, width // span, MERGE, PATCH_SIZE, 3)
    return values.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * frames * PATCH_SIZE**2)


def look(
    tower: Qwen2_5_VisionTransformerPretrainedModel, pixels: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Features of the patches (batch, tokens, 4, width) and of the merged tokens (batch, tokens, width)."""
    batch, (rows, columns) = len(pixels), size
    grid = torch.tensor([[1, MERGE * rows, MERGE * columns]] * batch)
    seen = tower(pack(pixels), grid_thw=grid)
    windows, _ = get_vision_window_index(grid, MERGE, tower.window_size, tower.patch_size)
    patches = seen.last_hidden_state.view(-1, MERGE**2, WIDTH)[windows.argsort()]
    return patches.view(batch, rows * columns, MERGE**2, WIDTH), seen.pooler_output.view(batch, rows * columns, -1)


class TowerHeads(nn.Module):
    """Linear heads that only training uses, on the patches before the merger and on the tokens behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_norm, self.token_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.patch = nn.Linear(WIDTH, sum(PATCH_LABELS.values()))
        self.token = nn.Linear(WIDTH, sum(LABEL_SIZES.values()))

    def forward(
        self, patches: Tensor, tokens: Tensor, patch_labels: Tensor, token_labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Losses, and shares of the patches and tokens that hold something where a label is right.

        `patch_labels` is (batch, labels, tokens, 4), `token_labels` (batch, labels, tokens).
        """
        heads = (
            ("", PATCH_LABELS, self.patch(self.patch_norm(patches)), patch_labels),
            ("token_", LABEL_SIZES, self.token(self.token_norm(tokens)), token_labels),
        )
        losses, right = {}, {}
        for prefix, sizes, logits, labels in heads:
            parts = logits.split(tuple(sizes.values()), dim=-1)
            for name, part, target in zip(sizes, parts, labels.unbind(1), strict=False):
                losses[prefix + name] = label_loss(part, target)
                right["acc_" + prefix + name] = label_accuracy(part, target)
        return losses, right
