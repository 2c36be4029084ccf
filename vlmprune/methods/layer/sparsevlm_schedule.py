"""How many tokens SparseVLM keeps and recycles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from vlmprune.methods.staged_method import scaled_cuts, solve_shares, unreachable

# Tokens kept behind layers 2, 6 and 15 of 32, of 576, by the official code's nominal average.
RETAINED: Mapping[str, Mapping[int, tuple[int, int, int]]] = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
OFFICIAL_CUTS = (3, 7, 16)
OFFICIAL_DEPTH = 32
OFFICIAL_TOKENS = 576

# Shares of the stages for `keep`, powers of one share: between those of the official lists.
_POWERS = (1.0, 1.5, 2.5)


class Recycling(NamedTuple):
    """What becomes of one image's tokens at one stage.

    Attributes:
        kept: tokens that stay as they are.
        recycled: of the others, those that are clustered.
        clusters: tokens that are made of these.
    """

    kept: int
    recycled: int
    clusters: int

    @property
    def total(self) -> int:
        """Tokens after the stage."""
        return self.kept + self.clusters


def recycling(alive: int, kept: int, share: float, size: int) -> Recycling:
    """Return what the official rule makes of `alive` tokens of which `kept` stay; nothing is recycled with a `share` of 0."""
    if not share or kept >= alive:
        return Recycling(kept, 0, 0)
    recycled = int(share * (alive - kept)) + 1
    return Recycling(kept, min(recycled, alive - kept), int(recycled / size) + 1)


@lru_cache(maxsize=4096)
def recycling_to(alive: int, total: int, share: float, size: int) -> Recycling:
    """Return the stage after which `total` of `alive` tokens are left, as many of them as possible kept as they are.

    Where `total` is too small for the rule, one token is kept and the rest of them are clusters.
    """
    if total >= alive:
        return Recycling(alive, 0, 0)
    for kept in range(total, 0, -1):
        stage = recycling(alive, kept, share, size)
        if stage.total == total:
            return stage
    return recycling(alive, 1, share, size)._replace(clusters=total - 1)


def default_cuts(layers: int, stages: int = 3) -> tuple[int, ...]:
    """Return the official cuts, scaled to the depth."""
    return scaled_cuts(OFFICIAL_CUTS[:stages], OFFICIAL_DEPTH, layers)


@lru_cache(maxsize=1024)
def solve_stages(share: float, layers: int, cuts: tuple[int, ...] | None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return cuts and shares of what enters, recycled tokens included, whose average over `layers` is `share`.

    Without `cuts` these are the official ones by depth, the first at layer 1 if the average needs it.

    Raises:
        BudgetError: the layers before the first cut alone exceed the average.
    """
    places = cuts or default_cuts(layers)
    for tried in (places,) if cuts is not None else (places, (1, *places[1:])):
        powers = [_POWERS[min(stage, 2)] + max(0, stage - 2) for stage in range(len(tried))]
        first = solve_shares(share, layers, tried, partial(_shares, powers))
        if first is not None:
            return tried, _shares(powers, first)
    raise unreachable(share, layers, places[0] if cuts is not None else 1)


def _shares(powers: Sequence[float], first: float) -> tuple[float, ...]:
    return tuple(first**power for power in powers)
