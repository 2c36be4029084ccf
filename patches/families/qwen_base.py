"""What the Qwen-VL models have in common: packed towers, merged patches, 3-D positions, images and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout, raster_layout

from ..calls import PIXELS
from ..parts import Part, missing_parts
from ..tower.encoded_visuals import EncodedVisuals
from ..tower.packed import PackedTowerReader
from ..tower.reader import TowerReader
from .facts import PictureKind, Preparation, TowerKind
from .family import Family
from .wrappers import without_wrappers

_MARKERS = {
    "<|image_pad|>": ("image_token_id", "image_token"),
    "<|video_pad|>": ("video_token_id", "video_token"),
    "<|vision_start|>": ("vision_start_token_id", "vision_bos_token"),
    "<|vision_end|>": ("vision_end_token_id", "vision_eos_token"),
}


BLOCK_PARTS = (
    Part("vision_tower", ("grid_thw",)),
    Part("vision_tower.spatial_merge_size"),
    Part("vision_tower.blocks.*", ("cu_seqlens", "position_embeddings")),
    *(
        Part(f"vision_tower.blocks.*.{name}")
        for name in ("norm1", "attn.qkv", "attn.proj", "attn.scaling", "norm2", "mlp")
    ),
)
"""What reducing tokens in a block of the vision tower relies on."""


def qwen_preparation(processor: str, video_processor: str = "Qwen2VLVideoProcessor") -> Preparation:
    """Return how prompts of a Qwen-VL family are prepared."""
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    return Preparation(processor, "Qwen2VLImageProcessor", video_processor, picture, _MARKERS)


class QwenVL(Family):
    """Images of any size, one raster of merged patches each; videos are such rasters frame by frame; M-RoPE positions."""

    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    mrope: ClassVar[bool] = True
    tower_kind: ClassVar[TowerKind] = "packed"
    picture_kind: ClassVar[PictureKind] = "grids"
    parts: ClassVar[tuple[Part, ...]] = (
        *Family.parts,
        Part("multimodal_model.get_image_features", (PIXELS["image"], "image_grid_thw")),
        Part("multimodal_model.get_video_features", (PIXELS["video"], "video_grid_thw")),
    )
    tower_parts: ClassVar[tuple[Part, ...]] = (
        Part("vision_tower", ("grid_thw",)),
        Part("vision_tower.spatial_merge_size"),
        Part("vision_tower.blocks.*.attn", ("cu_seqlens", "position_embeddings")),
        Part("vision_tower.blocks.*.attn.qkv"),
        Part("vision_tower.blocks.*.attn.scaling"),
        Part("projector"),
    )

    @property
    def vision_tower(self) -> nn.Module:
        """The vision transformer, patch merger included."""
        return without_wrappers(self.multimodal_model.visual)  # type: ignore[arg-type]

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads the fused projection of packed sequences."""
        return PackedTowerReader()

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `attn` of a block."""
        return self.vision_tower.blocks[layer].attn  # type: ignore[index, union-attr]

    @property
    def projector(self) -> nn.Module:
        """The patch merger."""
        return self.vision_tower.merger  # type: ignore[return-value]

    @property
    def has_packed_blocks(self) -> bool:
        """True where the blocks are built as those that reducing tokens in them relies on."""
        return not missing_parts(self, BLOCK_PARTS)

    def tile_counts(self, visuals: EncodedVisuals) -> tuple[int, ...]:
        """Return the frames of each image or video."""
        grids: Any = visuals.inputs[f"{visuals.modality}_grid_thw"].tolist()
        return tuple(frames for frames, _, _ in grids)

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation by colour that the family's processor takes pixels by."""
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    @property
    def has_grid(self) -> bool:
        """Every image is one plain raster."""
        return True

    def check_encoding(self, modality: str, inputs: Mapping[str, Any]) -> None:
        """Check the grids against the pixels, which the host does not do, or only by chance.

        Raises:
            LayoutError: no grid, a grid of which no whole tokens can be made, or grids of other pixels.
        """
        name, pixels = f"{modality}_grid_thw", inputs.get(PIXELS[modality])
        grid = inputs.get(name)
        if not isinstance(grid, Tensor) or grid.ndim != 2 or grid.shape[1] != 3:
            shape = list(grid.shape) if isinstance(grid, Tensor) else grid
            raise LayoutError(
                f"{PIXELS[modality]} came with {name}={shape}; needed: the processor's tensor of shape [{modality}s, 3]."
            )
        merge = int(self.config.vision_config.spatial_merge_size)
        grids = grid.tolist()
        for number, (frames, rows, columns) in enumerate(grids):
            if frames < 1 or rows < merge or columns < merge or rows % merge or columns % merge:
                raise LayoutError(
                    f"{modality.capitalize()} {number} has {frames} x {rows} x {columns} patches in {name}; allowed: "
                    f"frames >= 1, rows and columns in multiples of {merge}, {merge} at least. The image is "
                    "too small, or the processor's `merge_size` is not the model's."
                )
        patches = sum(frames * rows * columns for frames, rows, columns in grids)
        if isinstance(pixels, Tensor) and len(pixels) != patches:
            raise LayoutError(
                f"{PIXELS[modality]} holds {len(pixels)} patches, {name} {grids} stands for {patches}; allowed: the same."
            )

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image; for a video the rasters of all its frames.

        Raises:
            LayoutError: the grids do not give the number of tokens that were encoded.
        """
        grids: Any = visuals.inputs[f"{visuals.modality}_grid_thw"].tolist()
        merge = int(self.config.vision_config.spatial_merge_size)
        layouts = tuple(raster_layout(rows // merge, columns // merge, frames) for frames, rows, columns in grids)
        if tuple(layout.total for layout in layouts) != visuals.counts:
            raise LayoutError(
                f"{visuals.modality}_grid_thw {grids} stands for {[layout.total for layout in layouts]} visual tokens, "
                f"the vision tower made {list(visuals.counts)}."
            )
        return layouts

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Return `signal [visual tokens, channels]` as it is: the reader has brought merged patches together already."""
        if len(signal) != sum(visuals.counts):
            raise LayoutError(
                f"The vision tower scored {len(signal)} tokens, the features have {list(visuals.counts)} visual tokens."
            )
        return signal
