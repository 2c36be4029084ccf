"""How many patches leave each block of a vision tower: budgets, and methods that remove about as many in every block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from vlmprune.budget import Keep, token_budget
from vlmprune.errors import BudgetError

Limit = Callable[[int], int]


def half(patches: int) -> int:
    """Return how many of a block's patches a bipartite match can remove at most."""
    return patches // 2


def counts_after(patches: int, removals: Sequence[int], limit: Limit = half) -> tuple[int, ...]:
    """Return the patches that leave each block, given how many it shall remove; `limit` caps it."""
    counts = []
    for removed in removals:
        patches -= max(0, min(removed, limit(patches)))
        counts.append(patches)
    return tuple(counts)


def plan_for_keep(keep: Keep, merged: bool, patches: int, blocks: int, limit: Limit = half) -> tuple[int, ...]:
    """Return the schedule of nearly constant removals that meets `keep` exactly.

    Args:
        keep: share of `patches`, or their number.
        merged: whether it is what leaves the last block, else the average of what leaves the blocks.
        patches: patches of a tile.
        blocks: blocks.
        limit: how many of a block's patches can be removed at most.

    Raises:
        BudgetError: even the most that can be removed in every block leaves more; names the nearest.
    """
    target = target_sum(keep, merged, patches, blocks)
    lowest = counts_after(patches, [patches] * blocks, limit)
    least = lowest[-1] if merged else sum(lowest)
    if target < least:
        raise unreachable(
            keep, merged, patches, blocks, least, "a block removes half of its patches at most, so at least"
        )
    return (_last_count if merged else _sum_of_counts)(target, patches, blocks, limit)


def target_sum(keep: Keep, merged: bool, patches: int, blocks: int) -> int:
    """Return the patches that are to leave the last block, or with `merged` off those that leave all blocks in sum."""
    if isinstance(keep, int):
        return min(keep, patches) * (1 if merged else blocks)
    return token_budget(keep, patches) if merged else max(blocks, round(keep * patches * blocks))


def unreachable(keep: Keep, merged: bool, patches: int, blocks: int, least: int, why: str) -> BudgetError:
    """Return the error that at least `least` patches, in sum where `merged` is off, are left; `why` leads to their number."""
    per_tile = least if merged else -(-least // blocks)
    share = math.ceil(least / (patches if merged else patches * blocks) * 1e4) / 1e4
    nearest = f"{per_tile}" if isinstance(keep, int) else f"{share:g}"
    what = "leave the tower" if merged else f"leave a block, averaged over {blocks} blocks"
    return BudgetError(
        f"keep={keep!r} of {patches} patches cannot be reached: {why} {least if merged else least / blocks:g} {what}; "
        f"nearest: keep={nearest}."
    )


def largest(holds: Callable[[int], bool], end: int) -> int:
    """Return the largest number up to `end` for which `holds`, which it does up to some number."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


@lru_cache(maxsize=256)
def _last_count(target: int, patches: int, blocks: int, limit: Limit) -> tuple[int, ...]:
    """Constant removals, one more in the first blocks."""
    removed = largest(lambda r: counts_after(patches, [r] * blocks, limit)[-1] >= target, patches)
    for more in range(blocks + 1):
        counts = counts_after(patches, [removed + 1] * more + [removed] * (blocks - more), limit)
        if counts[-1] <= target:
            break
    return counts


@lru_cache(maxsize=256)
def _sum_of_counts(target: int, patches: int, blocks: int, limit: Limit) -> tuple[int, ...]:
    """Constant removals, one more in some blocks."""
    removed = largest(lambda r: sum(counts_after(patches, [r] * blocks, limit)) >= target, patches)
    counts = list(counts_after(patches, [removed] * blocks, limit))
    lower = counts_after(patches, [removed + 1] * blocks, limit)
    # From one schedule to the next, a token at a time and from the last block on, so that removals differ by one.
    while sum(counts) > target:
        for block in reversed(range(blocks)):
            before = counts[block - 1] if block else patches
            stays = counts[block] == lower[block] or (block + 1 < blocks and counts[block + 1] == counts[block])
            if not stays and before - counts[block] + 1 <= limit(before):
                counts[block] -= 1
            if sum(counts) == target:
                break
    return tuple(counts)
