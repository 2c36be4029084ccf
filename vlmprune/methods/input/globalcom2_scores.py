"""The scores of GlobalCom2: of a token inside its tile, of the thumbnail for the crops, and of both together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import VisionSignal, VisualBatch
from vlmprune.methods.shared.tile_segments import TileSegments, to_device


def local_scores(batch: VisualBatch, segments: TileSegments) -> Tensor:
    """Return the score of every token inside its tile, fp32 `[tokens]`: CLS logits, or the no-CLS score."""
    if batch.tower.has_cls:
        return batch.vision[VisionSignal("cls_logits", batch.tower.layers - 1)].float().mean(-1)
    features = batch.features.float()
    segment = to_device(segments.segment, features.device)
    mean = features.new_zeros(segments.sizes.numel(), features.shape[1]).index_add_(0, segment, features)
    return -(normalize(features, dim=-1) * normalize(mean, dim=-1)[segment]).sum(-1)


def guide(scores: Tensor, layout: VisualLayout, temperature: float) -> tuple[Tensor, Tensor]:
    """Return what the thumbnail says of one image: `sigma_j - mean(sigma)` of every crop, and its score at every token.

    Args:
        scores: fp32 `[tokens]` of the image.

    Returns:
        fp64 `[crops]` and fp32 `[tokens]`, 0 outside the crops.
    """
    view = torch.zeros_like(scores)
    if layout.crops is None or layout.tile_grid is None:
        return scores.new_zeros(0, dtype=torch.float64), view
    (rows, columns), (height, width) = layout.crops, layout.tile_grid
    is_patch = ~layout.newline
    thumbnail = scores[to_device((is_patch & (layout.tile == 0)).nonzero().flatten(), scores.device)]
    cell_row = (torch.arange(height) // max(1, height // rows)).clamp(max=rows - 1)
    cell_column = (torch.arange(width) // max(1, width // columns)).clamp(max=columns - 1)
    cell = to_device((cell_row[:, None] * columns + cell_column).flatten(), scores.device)
    sums = scores.new_zeros(rows * columns, dtype=torch.float64).index_add_(0, cell, thumbnail.double())
    sigma = ((sums - sums.max()) / temperature).exp()
    sigma = sigma / (sigma.sum() + 1e-8)

    inside = (is_patch & (layout.tile > 0)).nonzero().flatten()
    if len(inside):
        # The thumbnail shows the image without its padding, as far as the tokens of the crops go.
        row, column = layout.stitched_row[inside], layout.stitched_column[inside]
        row, column = row - row.min(), column - column.min()
        size = (int(row.max()) + 1, int(column.max()) + 1)
        resized = interpolate(thumbnail.view(1, 1, height, width), size, mode="bilinear", align_corners=False)
        values = resized.flatten()[to_device(row * size[1] + column, scores.device)]
        view.index_copy_(0, to_device(inside, scores.device), values)
    return sigma - sigma.mean(), view


def holistic_scores(scores: Tensor, view: Tensor, segments: TileSegments) -> Tensor:
    """Return own plus thumbnail's score, each L2-normalised over the tile, fp32 `[tokens]`; own scores outside the crops."""
    width = segments.sizes.shape[1]
    segment = to_device(segments.segment, scores.device)
    both = torch.stack([scores, view], dim=1)
    squares = both.new_zeros(segments.sizes.numel(), 2).index_add_(0, segment, both.square())
    column = segment % width
    summed = (both / squares.sqrt().clamp(min=1e-12)[segment]).sum(1)
    return torch.where((column > 0) & (column < width - 1), summed, scores)
