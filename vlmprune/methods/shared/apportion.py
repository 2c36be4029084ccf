"""Whole budgets from shares: a total split over parts that can only hold so much."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of a part without weight: it gets tokens only once all other parts are full.
_LAST_RESORT = 1e-9


def apportion(totals: Tensor, weights: Tensor, capacities: Tensor) -> Tensor:
    """Split `totals [rows]` over `[rows, parts]` in proportion to the weights, exactly and without waiting for the device.

    A part never gets more than its capacity; what it cannot hold goes to the others in proportion. Fractions are
    rounded by the largest remainder, the lowest index first. Each row of the result sums to `min(total, sum of
    capacities)`.

    Args:
        totals: int64 `[rows]`.
        weights: `[rows, parts]`; negative ones and NaN count as 0, and parts of weight 0 are served last.
        capacities: int64 `[rows, parts]`.

    Returns:
        int64 `[rows, parts]`.
    """
    if capacities.shape[-1] == 0:
        return torch.zeros_like(capacities)
    room = capacities.double()
    wanted = torch.minimum(totals, capacities.sum(-1)).double()[:, None]
    shares = torch.nan_to_num(weights.double()).clamp(min=0)
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) + _LAST_RESORT
    # Parts fill up in the order of capacity per share; with the first `i` full, the others divide the rest by their
    # shares.
    order = (room / shares).argsort(dim=-1, stable=True)
    ordered_room, ordered_shares = room.gather(-1, order), shares.gather(-1, order)
    full = ordered_room.cumsum(-1) - ordered_room
    open_shares = ordered_shares.flip(-1).cumsum(-1).flip(-1)
    level = (wanted - full) / open_shares
    # The first level that no longer overflows the next part is the true one, and it is the lowest that any part allows.
    fits = level * ordered_shares <= ordered_room
    first = torch.where(fits.any(-1), fits.int().argmax(-1), room.shape[-1] - 1)
    exact = torch.minimum(room, level.gather(-1, first[:, None]).clamp(min=0) * shares)
    whole = exact.floor()
    fraction = torch.where(whole < room, exact - whole, -1.0)
    rank = fraction.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (whole + (rank < wanted - whole.sum(-1, keepdim=True))).to(torch.int64)
