"""Farthest-point choice on a long segment by matrix products: exact, and no matrix of tokens times tokens is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Candidates that picks are taken from before all tokens are compared with these picks.
SMALLEST_POOL, LARGEST_POOL = 32, 512

# Columns of cosines that are held of all tokens at a time.
BLOCK = 256

# Rows whose exact nearest neighbour is looked for first, so that others can be ruled out.
PROBED = 64


def greedy_in_pools(
    rows: Tensor, seed: int, k: int, weight: Tensor | None, last: Tensor | None, snapped: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `k` picks in pick order, the seed first, each with the lowest highest cosine to those before it.

    What a pick does to a token can only make it worse, so the best tokens of a moment go on to be picked among themselves
    as long as they are better than the best of the others was then. All tokens are compared with the picks of a pool at once,
    in a matrix product, where one pick at a time would read all features for each.

    Args:
        rows: fp32 `[tokens, dim]` of length one or zero.
        seed: the first pick.
        k: picks.
        weight: fp32 `[tokens]`; then a pick has the highest `weight * (1 - cosine)`.
        last: bool `[tokens]`, to be picked after all others; None for none.
        snapped: what makes cosines of equal rows equal.
    """
    tokens, picks, size = len(rows), [seed], SMALLEST_POOL
    running = snapped(rows @ rows[seed])
    if last is not None:
        running.masked_fill_(last, torch.finfo(torch.float32).max)
    if weight is not None:
        # A weight of 0 would turn the infinity of a chosen token into NaN.
        weight = weight.clone() if last is None else weight.masked_fill(last, 1.0)
        weight[seed] = 1.0
    running[seed] = torch.inf
    while len(picks) < k:
        keys = _keys(running, weight)
        pool = torch.cat([keys.topk(min(size, tokens), largest=False).indices, keys.argmin()[None]]).unique()
        bound = float(keys.index_fill(0, pool, torch.inf).min())
        chosen = pool[_picks_of_pool(rows[pool], running[pool], None if weight is None else weight[pool],
                                     k - len(picks), bound, snapped)]  # fmt: skip
        picks += chosen.tolist()
        if len(picks) < k:
            for part in chosen.split(BLOCK):
                torch.maximum(running, snapped((rows @ rows[part].T).amax(1)), out=running)
            running[chosen] = torch.inf
            if weight is not None:
                weight[chosen] = 1.0
        if 2 * len(chosen) >= size:
            size = min(2 * size, LARGEST_POOL)
        elif 8 * len(chosen) < size:
            size = max(size // 2, SMALLEST_POOL)
    return torch.tensor(picks, dtype=torch.int64, device=rows.device)


def _keys(running: Tensor, weight: Tensor | None) -> Tensor:
    """Return what the next pick has the lowest of."""
    return running if weight is None else (running - 1.0).mul_(weight)


def _picks_of_pool(
    rows: Tensor,
    running: Tensor,
    weight: Tensor | None,
    most: int,
    bound: float,
    snapped: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the next picks among a pool that has the best token of all, int64; one, and more while keys are below `bound`."""
    cosines = snapped(rows @ rows.T)
    weight = None if weight is None else weight.clone()
    picks: list[int] = []
    while len(picks) < min(most, len(rows)):
        keys = _keys(running, weight)
        pick = int(keys.argmin())
        # Of equal ones outside one may come first.
        if picks and not float(keys[pick]) < bound:
            break
        picks.append(pick)
        torch.maximum(running, cosines[pick], out=running)
        running[pick] = torch.inf
        if weight is not None:
            weight[pick] = 1.0
    return torch.tensor(picks, dtype=torch.int64, device=rows.device)


def farthest_from_nearest(rows: Tensor, last: Tensor | None, snapped: Callable[[Tensor], Tensor]) -> int:
    """Return the token whose highest cosine to another token is lowest; of equal ones the first.

    Tokens are compared with ever more others, and those that have a nearer neighbour than some token has at all are not
    compared any further.

    Args:
        rows: fp32 `[tokens, dim]` of length one or zero.
        last: bool `[tokens]`, to be returned only if there is no other; None for none.
        snapped: what makes cosines of equal rows equal.
    """
    tokens = len(rows)
    left, mine = torch.arange(tokens, device=rows.device), rows
    if last is not None and not bool(last.all()):
        left = (~last).nonzero().flatten()
        mine = rows[left]
    highest = torch.full((len(left),), -torch.inf, device=rows.device)
    turns = -(-tokens // BLOCK)
    best = (torch.inf, tokens)
    for turn in range(turns):
        columns = torch.arange(turn, tokens, turns, device=rows.device)
        torch.maximum(highest, _nearest_among(mine, left, rows, columns), out=highest)
        values = snapped(highest)
        if turn in (0, turns // 8):
            place = values.argsort(stable=True)[:PROBED]
            exact = snapped(_nearest_among(mine[place], left[place], rows, torch.arange(tokens, device=rows.device)))
            best = min(best, *zip(exact.tolist(), left[place].tolist(), strict=True))
        alive = (values < best[0]) | ((values == best[0]) & (left < best[1]))
        survivors = int(alive.sum())
        if not survivors:
            return best[1]
        # Copying what is left of the features pays where much of them goes.
        if 4 * survivors < 3 * len(left):
            left, mine, highest = left[alive], mine[alive], highest[alive]
    return min(best, *zip(snapped(highest).tolist(), left.tolist(), strict=True))[1]


def _nearest_among(mine: Tensor, numbers: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the highest cosine of `mine`, which are the rows `numbers`, to the rows `columns` other than itself."""
    others = rows if len(columns) == len(rows) else rows[columns]
    step = max(1, BLOCK * 4096 // max(1, len(columns)))
    found = []
    for part, number in zip(mine.split(step), numbers.split(step), strict=True):
        cosines = part @ others.T
        found.append(cosines.masked_fill_(number[:, None] == columns, -torch.inf).amax(1))
    return torch.cat(found)
