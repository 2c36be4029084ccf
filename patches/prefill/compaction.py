"""Index arithmetic of a compacted sequence: which columns stay, and how results return to the caller's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.kernels.compact import compact


@dataclass(frozen=True, eq=False)
class Compaction:
    """How the rows of a call shrink. Kept tokens are packed to the right, so that every row ends in the last column.

    They keep their order, except where merged tokens stand behind the others of their image.

    Attributes:
        index: int64 `[batch, width]`, the caller's column that stands in each compacted column; -1 is padding.
        destination: int64 `[batch, columns]`, the compacted column of each of the caller's columns; `width` where it was dropped.
        dropped_before: int64 `[batch, columns]`, visual tokens dropped before each of the caller's columns.
        lengths: kept tokens per row, text included.
        removed: visual tokens dropped per row.
        places: int64 `[batch, width]`, like `index` in the order of the caller's columns, whose gapless 1-D positions tokens
            take where the order is another; None where it is not.
    """

    index: Tensor
    destination: Tensor
    dropped_before: Tensor
    lengths: tuple[int, ...]
    removed: tuple[int, ...]
    places: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns of the compacted sequence."""
        return self.index.shape[1]

    @property
    def ragged(self) -> bool:
        """Whether some rows hold padding."""
        return any(length != self.width for length in self.lengths)


def plan_compaction(keep: Tensor, visual: Tensor, lengths: tuple[int, ...], removed: tuple[int, ...]) -> Compaction:
    """Plan the compaction of a batch without waiting for the device.

    Args:
        keep: bool `[batch, columns]`, the tokens that stay (padding of the caller does not).
        visual: bool `[batch, columns]`, the visual tokens before pruning.
        lengths: number of true entries per row of `keep`, known on the host.
        removed: visual tokens dropped per row, known on the host.
    """
    batch, columns = keep.shape
    width = max(lengths)
    shift = torch.tensor([width - length for length in lengths]).to(keep.device, non_blocking=True)
    rank = keep.cumsum(1) - 1 + shift[:, None]
    destination = torch.where(keep, rank, width)
    index = torch.full((batch, width + 1), -1, device=keep.device)
    index.scatter_(1, destination, torch.arange(columns, device=keep.device).expand(batch, -1))
    dropped = visual & ~keep
    return Compaction(
        index=index[:, :width],
        destination=destination,
        dropped_before=dropped.cumsum(1),
        lengths=lengths,
        removed=removed,
    )


def gather_columns(planes: Sequence[Tensor], index: Tensor, dims: Sequence[int] | None = None) -> list[Tensor]:
    """Return the columns `index [batch, width]` of every plane, 0 where it is -1; `dims` says where each plane has its batch."""
    # The kernel has no backward; the reference has.
    needs_backward = any(plane.requires_grad for plane in planes)
    return compact(planes, index, dims=dims, implementation="torch" if needs_backward else None)


def restore_columns(compacted: Tensor, compaction: Compaction) -> Tensor:
    """Spread `compacted [batch, width, dim]` over the caller's columns; rows of dropped tokens and of padding are zero."""
    batch, width, dim = compacted.shape
    columns = compaction.destination.shape[1]
    rows = torch.arange(batch, device=compacted.device)[:, None]
    target = torch.where(compaction.index >= 0, compaction.index + rows * columns, batch * columns)
    spread = compacted.new_zeros(batch * columns + 1, dim)
    spread = spread.index_copy(0, target.flatten(), compacted.reshape(batch * width, dim))
    return spread[:-1].view(batch, columns, dim)
