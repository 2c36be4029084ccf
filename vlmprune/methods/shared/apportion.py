"""Whole budgets from shares: a total split over parts that can only hold so much."""

from __future__ import annotations

import torch
from torch import Tensor

# Remainders closer than this are ties: 1/3 and 4/3 - 1 differ only by rounding.
_TIE = 2.0**-32


def apportion(totals: Tensor, weights: Tensor, capacities: Tensor) -> Tensor:
    """Split `totals [rows]` over `[rows, parts]` in proportion to the weights, exactly and without waiting for the device.

    A part never gets more than its capacity; what it cannot hold goes to the others in proportion. Fractions are
    rounded by the largest remainder, the lowest index first. Parts of weight 0 share evenly what the others cannot
    hold. Each row of the result sums to `min(total, sum of capacities)`.

    Args:
        totals: int64 `[rows]`.
        weights: `[rows, parts]`; negative ones and NaN count as 0.
        capacities: int64 `[rows, parts]`.

    Returns:
        int64 `[rows, parts]`.
    """
    if capacities.shape[-1] == 0:
        return torch.zeros_like(capacities)
    shares = torch.nan_to_num(weights.double()).clamp(min=0)
    shares = shares / shares.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    weighted = shares > 0
    first = _fill(totals, shares, capacities.where(weighted, 0))
    rest = _fill(totals - first.sum(-1), (~weighted).double(), capacities.where(~weighted, 0))
    return first + rest


def _fill(totals: Tensor, shares: Tensor, capacities: Tensor) -> Tensor:
    """Split over the parts that have a share; the capacity of the others is 0."""
    room = capacities.double()
    wanted = torch.minimum(totals, capacities.sum(-1)).double()[:, None]
    # Parts fill up in the order of capacity per share; with the first `i` full, the others divide the rest by their
    # shares.
    order = (room / shares).nan_to_num(nan=torch.inf).argsort(dim=-1, stable=True)
    ordered_room, ordered_shares = room.gather(-1, order), shares.gather(-1, order)
    left = wanted - (ordered_room.cumsum(-1) - ordered_room)
    open_shares = ordered_shares.flip(-1).cumsum(-1).flip(-1)
    # The first division that no longer overflows the next part is the true one. Products, not quotients: exact at the last.
    fits = left * ordered_shares <= ordered_room * open_shares
    first = torch.where(fits.any(-1), fits.int().argmax(-1), room.shape[-1] - 1)[:, None]
    divided, divisor = left.gather(-1, first).clamp(min=0), open_shares.gather(-1, first)
    exact = torch.minimum(room, (divided * shares / divisor).nan_to_num())
    whole = (exact + _TIE).floor()
    remainder = ((exact - whole) / _TIE).round()
    rank = torch.where(whole < room, remainder, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (whole + (rank < wanted - whole.sum(-1, keepdim=True))).to(torch.int64)
