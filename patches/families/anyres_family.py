"""What LLaVA-NeXT and LLaVA-OneVision share: images cut in a thumbnail and crops, with newlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout

from ..parts import Part
from ..tower.encoded_visuals import EncodedVisuals
from .anyres import AnyresImage, AnyresLayout
from .llava import Llava


class AnyresFamily(Llava):
    """One CLIP or SigLIP tower over equally large tiles, several of them an image."""

    has_tiles: ClassVar[bool] = True
    parts: ClassVar[tuple[Part, ...]] = (
        *Llava.parts,
        Part("multimodal_model.get_image_features", ("image_sizes",)),
    )

    @property
    def has_grid(self) -> bool:
        """False: thumbnail, crops and newlines are no plain grid."""
        return False

    @property
    def tile_side(self) -> int:
        """Patches along the side of a tile."""
        vision = self.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def images(self, visuals: EncodedVisuals) -> tuple[AnyresImage, ...]:
        """Return how each encoded image was cut and packed."""
        raise NotImplementedError

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return the layout of each encoded image.

        Raises:
            LayoutError: the host packed another number of tokens.
        """
        layouts = tuple(image.layout for image in self.images(visuals))
        check_counts(visuals, layouts)
        return layouts

    def tile_counts(self, visuals: EncodedVisuals) -> tuple[int, ...]:
        """Return the thumbnail and the crops of each image."""
        return tuple(image.tiles for image in packed_images(visuals.layouts(self)))

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Bring `signal [tiles, tokens, channels]` in the order of the visual tokens, interpolated where the features are."""
        maps = self.tile_vision(signal, visuals, layouts)
        return torch.cat([image.pack(tiles) for image, tiles in zip(packed_images(layouts), maps, strict=True)])

    def tile_vision(
        self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]
    ) -> tuple[Tensor, ...]:
        """Return the whole maps of every image's tiles, without the CLS column."""
        return self.patch_maps(signal).split([image.tiles for image in packed_images(layouts)])

    def tile_rows(self, signal: Tensor, layouts: Sequence[VisualLayout]) -> tuple[Tensor, ...]:
        """Return per image the rows of its tiles, per video those of its frames, `[tiles, channels]`."""
        tiles = [layout.image.tiles if isinstance(layout, AnyresLayout) else layout.frames for layout in layouts]
        return signal.split(tiles)

    def patch_maps(self, signal: Tensor) -> Tensor:
        """Drop what precedes the patches of every tile: `[tiles, tokens, channels]` to `[tiles, side * side, channels]`."""
        return signal[:, signal.shape[1] - self.tile_side**2 :]


def packed_images(layouts: Sequence[VisualLayout]) -> tuple[AnyresImage, ...]:
    """Return how the images of these layouts were packed."""
    return tuple(layout.image for layout in layouts if isinstance(layout, AnyresLayout))


def check_counts(visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> None:
    """Raise LayoutError unless every layout has as many tokens as the host packed."""
    totals = tuple(layout.total for layout in layouts)
    if totals != visuals.counts:
        raise LayoutError(
            f"The model packed {list(visuals.counts)} visual tokens per {visuals.modality}, its configuration and the "
            f"given sizes make {list(totals)}; vision_feature_select_strategy must leave the patches alone and all of them."
        )
