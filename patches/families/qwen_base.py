"""What the Qwen-VL models have in common: packed towers, merged patches, 3-D positions, images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout, raster_layout
from vlmprune.methods.visual_batch import TowerFacts

from ..encoded_visuals import EncodedVisuals
from ..packed_tower import PackedTowerReader
from ..tower_reader import TowerReader
from .family import Family


class QwenVL(Family):
    """Images of any size, one raster of merged patches each; videos are such rasters frame by frame; M-RoPE positions."""

    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    mrope: ClassVar[bool] = True

    @property
    def vision_tower(self) -> nn.Module:
        """The vision transformer, patch merger included."""
        return self.multimodal_model.visual  # type: ignore[return-value]

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads the fused projection of packed sequences."""
        return PackedTowerReader()

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `attn` of a block."""
        return self.vision_tower.blocks[layer].attn  # type: ignore[index, union-attr, return-value]

    @property
    def vision_heads(self) -> int:
        """Number of attention heads of the vision tower."""
        return int(self.config.vision_config.num_heads)

    @property
    def tower_facts(self) -> TowerFacts:
        """There is no CLS token, and the visual tokens come from the last block."""
        depth = len(self.vision_tower.blocks)  # type: ignore[arg-type]
        return TowerFacts(layers=depth, feature_layer=depth - 1, has_cls=False)

    @property
    def has_grid(self) -> bool:
        """Every image is one plain raster."""
        return True

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image; for a video the rasters of all its frames.

        Raises:
            LayoutError: the grids do not give the number of tokens that were encoded.
        """
        grids: Any = visuals.inputs[f"{visuals.modality}_grid_thw"].tolist()
        merge = int(self.config.vision_config.spatial_merge_size)
        layouts = tuple(
            frames_layout(int(frames), int(rows) // merge, int(columns) // merge) for frames, rows, columns in grids
        )
        if tuple(layout.total for layout in layouts) != visuals.counts:
            raise LayoutError(
                f"{visuals.modality}_grid_thw {grids} stands for {[layout.total for layout in layouts]} visual tokens, "
                f"the vision tower made {list(visuals.counts)}."
            )
        return layouts

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Return `signal [visual tokens, heads]` as it is: the reader averages over merged patches already."""
        if len(signal) != sum(visuals.counts):
            raise LayoutError(
                f"The vision tower scored {len(signal)} tokens, the features have {list(visuals.counts)} visual tokens."
            )
        return signal


@lru_cache(maxsize=256)
def frames_layout(frames: int, rows: int, columns: int) -> VisualLayout:
    """Return the layout of `frames` rasters of `rows` x `columns` one after the other; one frame is an image."""
    image = raster_layout(rows, columns)
    if frames == 1:
        return image
    frame = torch.arange(frames).repeat_interleave(rows * columns)
    row, column = image.row.repeat(frames), image.column.repeat(frames)
    return VisualLayout(
        tile=torch.zeros_like(frame),
        row=row,
        column=column,
        stitched_row=row,
        stitched_column=column,
        newline=torch.zeros_like(frame, dtype=torch.bool),
        frame=frame,
        tile_grid=(rows, columns),
    )
