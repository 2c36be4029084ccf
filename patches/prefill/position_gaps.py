"""Position ids without the gaps that dropped tokens leave."""

from __future__ import annotations

import torch
from torch import Tensor


def dropped_positions(positions: Tensor, present: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each position goes down when the ids that no kept token uses any more are taken out.

    An id counts as used when any axis of a token has it. With 1-D positions this is the number of dropped tokens before.

    Args:
        positions: int64 `[batch, columns]` or `[axes, batch, columns]`. Of four axes the first is the 1-D position of the
            token, which the host makes masks from; it is treated for itself.
        present: bool `[batch, columns]`, tokens that are no padding.
        kept: bool `[batch, columns]`, tokens that stay.

    Returns:
        int64 like `positions`, and int64 `[batch, 1]`, how far positions after the last column go down.
    """
    if positions.ndim == 3 and positions.shape[0] == 4:
        plain, _ = dropped_positions(positions[0], present, kept)
        axes, removed = dropped_positions(positions[1:], present, kept)
        return torch.cat([plain[None], axes]), removed
    ids = positions if positions.ndim == 3 else positions[None]
    lowest = ids.amin((0, 2))[:, None]
    ids = ids - lowest
    # The highest id must be known on the host: temporal ids of videos may lie beyond the number of columns.
    highest = int(ids.max()) + 1
    used, still = (torch.zeros(ids.shape[1], highest + 1, dtype=torch.bool, device=ids.device) for _ in range(2))
    for axis in ids:
        used.scatter_(1, torch.where(present, axis, highest), True)
    for axis in ids:
        still.scatter_(1, torch.where(kept, axis, highest), True)
    gone = (used & ~still)[:, :highest].cumsum(1)
    lower = torch.stack([gone.gather(1, axis) for axis in ids])
    return lower.view(positions.shape), gone[:, -1:]
