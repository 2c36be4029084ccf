"""Which of the caller's columns a cache holds, and where they stand: what a prefill adds to what came before it."""

from __future__ import annotations

import torch
from torch import Tensor

from .state import LayerGroup, PrunedCacheState


def columns_held(group: LayerGroup | None, caller_past: int, batch: int, index: Tensor | None, width: int) -> Tensor:
    """Return the caller's column of every cache entry after a prefill, int64 `[batch, entries]`, -1 at padding.

    Args:
        group: the layers' entries at the end of the prefill before, or None if nothing was ever pruned.
        caller_past: tokens of the caller's sequence before this prefill.
        batch: rows.
        index: int64 `[batch, width]`, this call's column of each entry, -1 at padding; None if they are all its columns.
        width: entries that this prefill adds.
    """
    if index is None:
        new = torch.arange(caller_past, caller_past + width).expand(batch, -1)
    else:
        new = torch.where(index >= 0, index + caller_past, -1)
    if group is None:
        before = torch.arange(caller_past, device=new.device).expand(batch, -1)
        return torch.cat([before, new], dim=1)
    between = torch.arange(group.lowered.shape[1], caller_past, device=group.columns.device).expand(batch, -1)
    return torch.cat([group.columns, between, new.to(group.columns.device)], dim=1)


def positions_lowered(group: LayerGroup | None, caller_past: int, lower: Tensor | None, like: Tensor) -> Tensor:
    """Return how far positions have moved down up to each of the caller's columns, int64 `[batch, caller_past + columns]`.

    Args:
        group: the layers' entries at the end of the prefill before, or None if nothing was ever pruned.
        caller_past: tokens of the caller's sequence before this prefill.
        lower: int64 `[..., batch, columns]`, how far this prefill moves its positions down; None for not at all.
        like: positions `[..., batch, columns]` of this call.
    """
    batch, columns = like.shape[-2:]
    here = torch.zeros(batch, columns, dtype=torch.int64, device=like.device)
    if lower is not None:
        here = (lower[-3:].amax(0) if lower.ndim == 3 else lower).cummax(1).values
    before = torch.zeros(batch, caller_past, dtype=torch.int64, device=like.device)
    if group is not None:
        between = group.removed.expand(-1, caller_past - group.lowered.shape[1])
        before, here = torch.cat([group.lowered, between], dim=1), here + group.removed
    return torch.cat([before, here], dim=1)


def highest_positions(
    state: PrunedCacheState | None, caller_past: int, positions: Tensor, valid: Tensor | None
) -> Tensor:
    """Return the highest position id up to each of the caller's columns, int64 `[batch, caller_past + columns]`.

    A first prompt counts no further than its tokens: without position ids some hosts count padding too, and callers do not.

    Args:
        state: what the prefill before left behind, or None if nothing was ever pruned.
        caller_past: tokens of the caller's sequence before this prefill.
        positions: position ids `[..., batch, columns]` of this call, as the caller counts them.
        valid: bool `[batch, columns]`, false at padding; None if there is none.
    """
    here = positions[-3:].amax(0) if positions.ndim == 3 else positions
    if valid is not None:
        here = here.masked_fill(~valid, -1)
    if valid is not None and state is None and caller_past == 0:
        here = torch.minimum(here, valid.cumsum(1) - 1)
    before = here.new_full((here.shape[0], caller_past), -1)
    if state is not None:
        last = state.highest[:, -1:]
        before = torch.cat([state.highest, last.expand(-1, caller_past - state.caller_length)], dim=1)
    return torch.cat([before, here], dim=1).cummax(1).values
