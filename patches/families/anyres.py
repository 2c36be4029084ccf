"""Images cut in a thumbnail and crops: where the host puts the token of each patch, and values brought in that order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vlmprune.layout import VisualLayout


@dataclass(frozen=True)
class AnyresImage:
    """How the tiles of one image become its visual tokens.

    The tokens are the thumbnail's patches, then the crops stitched to one map, without the padding, with a newline at
    the end of every row. An image of one tile is that tile and one newline.

    Attributes:
        side: patches along the side of a tile.
        crops: rows and columns of crops; None for an image of one tile.
        window: top, left, height and width of what is left of the stitched map when the padding is off.
        resized: height and width to which the window is interpolated where it has too many patches, else None.
        newlines: whether there are newlines.
    """

    side: int
    crops: tuple[int, int] | None = None
    window: tuple[int, int, int, int] = (0, 0, 0, 0)
    resized: tuple[int, int] | None = None
    newlines: bool = True

    @property
    def tiles(self) -> int:
        """Number of tiles, the thumbnail included."""
        return 1 + (math.prod(self.crops) if self.crops else 0)

    def pack(self, maps: Tensor) -> Tensor:
        """Bring values per patch of every tile in the order of the visual tokens; 0 at newlines.

        Args:
            maps: `[tiles, side * side, channels]`.

        Returns:
            `[tokens, channels]`; where the host interpolates features, the values are interpolated in the same way.
        """
        thumbnail = maps[0]
        if self.crops is None:
            return pad(thumbnail, (0, 0, 0, int(self.newlines)))
        top, left, height, width = self.window
        stitched = maps[1:].unflatten(0, self.crops).unflatten(2, (self.side, self.side)).transpose(1, 2)
        stitched = stitched.flatten(0, 1).flatten(1, 2)[top : top + height, left : left + width]
        if self.resized is not None:
            plane = stitched.movedim(-1, 0)[None]
            stitched = interpolate(plane, self.resized, mode="bilinear")[0].movedim(0, -1)
        if self.newlines:
            stitched = pad(stitched, (0, 0, 0, 1))
        return torch.cat([thumbnail, stitched.flatten(0, 1)])

    @property
    def layout(self) -> AnyresLayout:
        """The layout of the visual tokens.

        The stitched coordinates of an interpolated map are those of the interpolated map; tile, row and column are
        then those of the patch nearest to the token. A newline belongs to the tile at its left.
        """
        return _layout(self)


@dataclass(frozen=True, eq=False)
class AnyresLayout(VisualLayout):
    """The layout of an image, and how it was packed."""

    image: AnyresImage = AnyresImage(1)


def anyres_image(
    image_size: Sequence[int],
    pinpoints: Sequence[Sequence[int]],
    tile_size: int,
    patch_size: int,
    max_crops: int | None = None,
) -> AnyresImage:
    """Return how an image of `(height, width)` pixels is cut and packed.

    Args:
        image_size: height and width in pixels, before any resizing.
        pinpoints: heights and widths in pixels that crops may fill together.
        tile_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        max_crops: N of `anyres_max_N`: with 1.1^2 times the patches of N tiles or more, the stitched map is interpolated.
    """
    size = (int(image_size[0]), int(image_size[1]))
    return _anyres_image(size, tuple((int(h), int(w)) for h, w in pinpoints), tile_size, patch_size, max_crops)


@lru_cache(maxsize=1024)
def _anyres_image(
    size: tuple[int, int],
    pinpoints: tuple[tuple[int, int], ...],
    tile_size: int,
    patch_size: int,
    max_crops: int | None,
) -> AnyresImage:
    side = tile_size // patch_size
    crops = get_anyres_image_grid_shape(size, list(pinpoints), tile_size)
    return cropped_image(crops, side, size, max_crops)


def cropped_image(
    crops: tuple[int, int], side: int, image_size: tuple[int, int] | None, max_crops: int | None = None
) -> AnyresImage:
    """Return how an image of `(height, width)` pixels is packed from these crops of `side * side` patches.

    Without `image_size` the padding stays.
    """
    rows, columns = crops[0] * side, crops[1] * side
    height, width = rows, columns
    if image_size is not None:
        height, width = unpad_image(torch.empty(1, rows, columns, device="meta"), image_size).shape[1:]
    ratio = math.sqrt(height * width / (max_crops * side**2)) if max_crops else 0.0
    return AnyresImage(
        side=side,
        crops=crops,
        window=((rows - height) // 2, (columns - width) // 2, height, width),
        resized=(int(height // ratio), int(width // ratio)) if ratio > 1.1 else None,
    )


@lru_cache(maxsize=256)
def _layout(image: AnyresImage) -> AnyresLayout:
    side = image.side
    place = torch.arange(side * side)
    absent = torch.full_like(place, -1)
    thumbnail = torch.stack([torch.zeros_like(place), place // side, place % side, absent, absent])
    if image.crops is None:
        thumbnail[3:] = thumbnail[1:3]
        newline = torch.tensor([[0], [-1], [-1], [-1], [-1]])[:, : int(image.newlines)]
        coordinates = torch.cat([thumbnail, newline], dim=1)
    else:
        coordinates = torch.cat([thumbnail, _crop_coordinates(image, image.crops[1])], dim=1)
    tile, row, column, stitched_row, stitched_column = coordinates
    return AnyresLayout(
        tile=tile,
        row=row,
        column=column,
        stitched_row=stitched_row,
        stitched_column=stitched_column,
        newline=row < 0,
        frame=torch.zeros_like(tile),
        tile_grid=(side, side),
        crops=image.crops,
        image=image,
    )


def _crop_coordinates(image: AnyresImage, crop_columns: int) -> Tensor:
    """Return tile, row, column, stitched row and stitched column of the tokens after the thumbnail, `[5, tokens]`."""
    side = image.side
    top, left, height, width = image.window
    rows, columns = image.resized or (height, width)
    first_row, first_column = (top, left) if image.resized is None else (0, 0)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns + image.newlines), indexing="ij")
    row, column = row.flatten(), column.flatten()
    newline = column == columns
    source_row = top + _nearest(rows, height)[row]
    source_column = left + _nearest(columns, width)[column.clamp(max=max(columns - 1, 0))]
    tile = 1 + source_row // side * crop_columns + source_column // side
    patch = torch.stack([source_row % side, source_column % side, first_row + row, first_column + column])
    return torch.cat([tile[None], patch.masked_fill(newline, -1)])


def _nearest(size: int, source: int) -> Tensor:
    """Return the source index nearest to each of `size` evenly spaced places, of which there is at least one."""
    places = ((torch.arange(max(size, 1), dtype=torch.float64) + 0.5) * source / max(size, 1)).long()
    return places.clamp(max=max(source - 1, 0))
