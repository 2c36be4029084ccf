"""How a picture becomes tiles as LLaVA-NeXT cuts it, what each tile shows, and how tile tokens become one sequence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from ..common.scenes import COLOURS, PATCH_SIZE, PRESENCE_SIZE, SHAPES, Scene, signed_distance
from ..llava.symbolic import SymbolicTokens
from ..llava.tower import GRID, WIDTH

TILE = 96
CELLS = TILE // PATCH_SIZE
PINPOINTS = [[96, 192], [192, 96], [192, 192], [192, 288], [288, 192]]
"""Height and width of the canvases that a picture can be laid on."""
FIRST = (GRID - CELLS) // 2
"""Row and column of tiny-llava's patch grid where the tile's own grid begins."""


def cut(picture: np.ndarray) -> Tensor:
    """Tiles `uint8` (1 + rows * columns, `TILE`, `TILE`, 3) of a picture whose sides are multiples of `TILE`.

    The first is the whole picture squeezed into one tile, as the processor does it.
    """
    whole = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    small = tvF.resize(whole, [TILE, TILE], interpolation=InterpolationMode.BICUBIC, antialias=True)
    crops = whole.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).permute(1, 3, 2, 4, 0).flatten(0, 1)
    return torch.cat([small.permute(1, 2, 0)[None], crops])


def thumbnail_labels(scene: Scene, cells: int) -> np.ndarray:
    """Labels (labels, cells, cells) of the first tile: shape, colour and centre; what is printed is too small for it."""
    labels = np.zeros((5, cells, cells), np.int64)
    width, height = scene.size / cells, scene.height / cells
    along, down = (np.arange(cells) + 0.5) * width, (np.arange(cells) + 0.5) * height
    for thing in scene.things:
        inside = signed_distance(thing.shape, along[None] - thing.x, down[:, None] - thing.y, thing.radius) < 3.0
        row, column = int(thing.y / height), int(thing.x / width)
        inside[row, column] = True
        labels[0][inside] = thing.shape + 1
        labels[1][inside] = thing.colour + 1
        labels[4][row, column] = 1
    return labels


def cut_labels(labels: np.ndarray, cells: int) -> np.ndarray:
    """Labels (crops, labels, cells, cells) of each crop; the first glyph that a crop shows has place one in it."""
    kinds, rows, columns = labels.shape
    crops = labels.reshape(kinds, rows // cells, cells, columns // cells, cells)
    crops = crops.transpose(1, 3, 0, 2, 4).reshape(-1, kinds, cells, cells).copy()
    order = crops[:, 3]
    first = np.where(order > 0, order, 99).min(axis=(1, 2), keepdims=True)
    crops[:, 3] = np.where(order > 0, order - first + 1, 0)
    return crops


def tile_presence(labels: np.ndarray) -> np.ndarray:
    """Which pairs of shape and colour and which glyphs each tile shows on two patches or more (tiles, `PRESENCE_SIZE`)."""
    hot = np.zeros((len(labels), PRESENCE_SIZE), np.float32)
    for row, (shape, colour, glyph) in zip(hot, labels[:, :3].reshape(len(labels), 3, -1), strict=True):
        row[: len(SHAPES) * len(COLOURS)] = np.bincount(
            ((shape - 1) * len(COLOURS) + colour - 1)[shape > 0], minlength=len(SHAPES) * len(COLOURS)
        )
        row[len(SHAPES) * len(COLOURS) :] = np.bincount(
            glyph[glyph > 0] - 1, minlength=PRESENCE_SIZE - len(SHAPES) * len(COLOURS)
        )
    return (hot > 1).astype(np.float32)


def stitch(tiles: Tensor, grid: tuple[int, int], newline: Tensor) -> Tensor:
    """One sequence (batch, tokens, width) of tile tokens (batch, tiles, cells * cells, width) on a grid of crops.

    The thumbnail's tokens come first, then the crops' in reading order of the whole picture, `newline` after every row.
    """
    cells = int(tiles.shape[2] ** 0.5)
    crops = tiles[:, 1:].unflatten(2, (cells, cells)).unflatten(1, grid)
    whole = crops.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    ends = newline.expand(*whole.shape[:2], 1, -1).to(whole.dtype)
    return torch.cat([tiles[:, 0], torch.cat([whole, ends], dim=2).flatten(1, 2)], dim=1)


class Stitcher(nn.Module):
    """`stitch` with the newline embedding that the model learns."""

    def __init__(self) -> None:
        super().__init__()
        self.newline = nn.Parameter(0.05 * torch.randn(WIDTH))

    def forward(self, tiles: Tensor, grid: tuple[int, int]) -> Tensor:
        """Sequence (batch, tokens, width) of tile tokens (batch, tiles, cells * cells, width)."""
        return stitch(tiles, grid, self.newline)


class TileSymbols(nn.Module):
    """tiny-llava's symbolic tokens for tiles, with a mark on the thumbnail's."""

    def __init__(self, symbols: SymbolicTokens) -> None:
        super().__init__()
        self.symbols = symbols
        self.thumbnail = nn.Parameter(0.05 * torch.randn(WIDTH))

    def forward(self, labels: Tensor, words: Tensor, window: Tensor) -> Tensor:
        """Tokens (batch, tiles, patches, width) for labels (batch, tiles, labels, patches) of tiles."""
        tokens = self.symbols(labels.flatten(0, 1), words, window).unflatten(0, labels.shape[:2])
        mark = torch.zeros(labels.shape[1], 1)
        mark[0] = 1
        return tokens + mark[..., None] * self.thumbnail
