"""What InternVL and SmolVLM share: equally large tiles, whose patches become visual tokens by square cells."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout

from ..tower.cells import CellTowerReader, cell_means
from ..tower.encoded_visuals import EncodedVisuals
from ..tower.reader import TowerReader
from .family import Family
from .llava import Llava


class ShuffledTiles(Llava):
    """Each tile is an image of its own: which of them were cut of one picture, the model is not told.

    So `keep` as a number is what is kept of a tile. Attention and keys of the patches of a cell are averaged; features of the
    tower stand side by side in the projector's input.
    """

    @property
    def cell_side(self) -> int:
        """Patches along the side of a visual token."""
        raise NotImplementedError

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads patch by patch."""
        return CellTowerReader(self.cell_side)

    def check(self) -> None:
        """Check the parts."""
        Family.check(self)

    @property
    def has_tower_blocks(self) -> bool:
        """False: what becomes of cells of which a block drops patches no method says."""
        return False

    @property
    def has_grid(self) -> bool:
        """Every tile is one raster of visual tokens."""
        return True

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per tile."""
        return tuple(self._layout(count) for count in visuals.counts)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Drop the CLS column of `signal [tiles, tokens, channels]` and average each cell; what has a row a cell stays."""
        return cell_vision(signal, visuals.counts, self.cell_side, self.tower_facts.has_cls)

    def project(self, features: Tensor) -> Tensor:
        """Turn rows `[rows, patches_per_token * dim]` of the signal "features", of any dtype, into visual tokens."""
        parameter = next(self.projector.parameters())
        device: Any = features.device if parameter.device.type == "meta" else parameter.device
        projected: Tensor = self.projector(features.to(device, parameter.dtype))
        return projected.to(features.device)


def cell_vision(signal: Tensor, counts: Sequence[int], side: int, has_cls: bool) -> Tensor:
    """Return a signal of each visual token of tiles, `[sum(counts), channels]`.

    Args:
        signal: `[tiles, tokens, channels]`, of patches or already of cells of them, a CLS column in front or not.
        counts: visual tokens of each tile.
        side: patches along the side of a visual token.
        has_cls: whether the tower has a CLS token.

    Raises:
        LayoutError: there are other numbers of tiles or tokens.
    """
    cells, leading = counts[0], int(has_cls)
    tokens, patches = signal.shape[1], cells * side**2
    if (
        len(signal) != len(counts)
        or len(set(counts)) > 1
        or tokens not in (cells, cells + leading, patches, patches + leading)
    ):
        raise LayoutError(
            f"The vision tower scored {tokens} tokens in each of {len(signal)} tiles, the tiles have {list(counts)} visual "
            f"tokens of {side} x {side} patches."
        )
    if tokens > cells + leading:
        return cell_means(signal[:, tokens - patches :], side).flatten(0, 1)
    return signal[:, tokens - cells :].flatten(0, 1)
