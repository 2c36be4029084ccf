"""Attention that the patches of a padded picture receive, averaged over cells, from the eager maps of the unpatched tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def received_by_cells(model: Any, pixels: Tensor, places: Tensor) -> list[Tensor]:
    """Return per picture the attention that each cell receives in the last layer, `[cells]`, in raster order."""
    tower = model.model.vision_tower
    previous = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        maps = tower(pixels, pixel_position_ids=places, output_attentions=True).attentions[-1]
    finally:
        tower.set_attn_implementation(previous)
    side, found = model.config.vision_config.pooling_kernel_size, []
    for weights, own in zip(maps, places.tolist(), strict=True):
        valid = [number for number, (x, _) in enumerate(own) if x >= 0]
        rows, columns = (max(own[number][axis] for number in valid) // side + 1 for axis in (1, 0))
        cells = torch.zeros(rows * columns)
        for key in valid:
            x, y = own[key]
            received = weights[:, valid, key].mean()
            cells[y // side * columns + x // side] += received / side**2
        found.append(cells)
    return found
