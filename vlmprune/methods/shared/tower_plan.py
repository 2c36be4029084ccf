"""How many patches leave each block of a vision tower, where they may go only in some blocks, or by shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vlmprune.budget import Keep
from vlmprune.errors import ParameterError
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_int

from .merge_schedule import Limit, half, largest, target_sum, unreachable

# Steps of a share that is looked for.
STEPS = 10_000


def all_but_one(patches: int) -> int:
    """Return the most patches that can be dropped."""
    return patches - 1


def leaving(
    keep: Keep,
    merged: bool,
    patches: int,
    blocks: int,
    *,
    merging: Sequence[int] | None = None,
    by: Literal["number", "share"] = "number",
    limit: Limit = half,
) -> tuple[int, ...]:
    """Return the schedule that meets `keep`: the same number goes in every merging block, one more in the first ones.

    Args:
        keep: share of `patches`, or their number.
        merged: whether it is what leaves the last block, met exactly; else the average of what leaves the blocks. Where
            whole tokens at the merging blocks cannot meet its sum, the next higher sum that they can is taken.
        patches: patches of a tile.
        blocks: blocks of the tower.
        merging: the blocks where patches may go; None for all.
        by: whether blocks take away the same number of patches, or the same share of those that they get.
        limit: the most that may go where so many are.

    Raises:
        BudgetError: even the most that may go leaves more; names the nearest.
    """
    some = tuple(range(blocks)) if merging is None else tuple(sorted(merging))
    target = target_sum(keep, merged, patches, blocks)

    def counts(level: int, more: set[int]) -> tuple[int, ...]:
        return _counts(patches, blocks, {block: (level, block in more) for block in some}, by, limit)

    def spent(level: int, more: set[int]) -> int:
        leaves = counts(level, more)
        return leaves[-1] if merged else sum(leaves)

    high = patches if by == "number" else STEPS
    least = spent(high, set())
    if least > target:
        why = f"{len(some)} of {blocks} blocks take patches away, and at least"
        raise unreachable(keep, merged, patches, blocks, least, why)
    # A higher level never leaves more patches, and one more patch in one block is one less at most behind it.
    low = largest(lambda level: spent(level, set()) >= target, high)
    more: set[int] = set()
    for block in some:
        if spent(low, more | {block}) >= target:
            more.add(block)
    return counts(low, more)


def check_blocks(name: str, blocks: object) -> tuple[int, ...]:
    """Return 0-based blocks in ascending order, none twice.

    Raises:
        ParameterError: no sequence of them, or an empty one.
    """
    if not isinstance(blocks, (tuple, list)) or not blocks:
        raise ParameterError(f"{name}={blocks!r}; allowed: a tuple of 0-based blocks of the vision tower.")
    for block in blocks:
        check_int(name, block, 0)
    return tuple(sorted(set(blocks)))


def blocks_within(name: str, some: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    """Return `some` blocks if the tower has them.

    Raises:
        ParameterError: it has not; names the last that it has.
    """
    if some[-1] >= blocks:
        raise ParameterError(
            f"{name}={some}; allowed: 0..{blocks - 1}, the blocks before this tower's features; nearest: {blocks - 1}."
        )
    return some


def spread_blocks(depths: Sequence[float], tower: TowerFacts) -> tuple[int, ...]:
    """Return the blocks at some depths (0 to 1) of a tower, of those before its features."""
    return tuple(sorted({min(tower.feature_layer, int(depth * tower.layers)) for depth in depths}))


def _counts(patches: int, blocks: int, levels: dict[int, tuple[int, bool]], by: str, limit: Limit) -> tuple[int, ...]:
    leaves = []
    for block in range(blocks):
        level, more = levels.get(block, (0, False))
        taken = level if by == "number" else patches * level // STEPS
        patches -= max(0, min(taken + more, limit(patches)))
        leaves.append(patches)
    return tuple(leaves)
