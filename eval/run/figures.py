"""Numbers as text: budgets as they were given, measurements with as many digits as they carry."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vlmprune.budget import Keep

NO_BUDGET = "-"


def keep_text(keep: Keep | None) -> str:
    """A budget as it was given: 1.0 is all tokens, 1 is one."""
    return NO_BUDGET if keep is None else str(keep)


def three_figures(value: float) -> str:
    """`value` with three figures, at most three of them after the point."""
    if value < 0:
        return f"-{three_figures(-value)}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def with_quartiles(spread: Mapping[str, float] | None, divisor: float = 1.0) -> str:
    """A median with its quartiles, `22.4 (22.1-23.0)`, no digit of which is finer than their distance."""
    if not spread:
        return "not measured"
    median, low, high = (spread[part] / divisor for part in ("median", "q25", "q75"))
    places = decimals(high - low, median)
    to = "-" if low >= 0 else " to "
    return f"{median:,.{places}f} ({low:,.{places}f}{to}{high:,.{places}f})"


def decimals(distance: float, median: float) -> int:
    """Places after the point that a median with quartiles so far apart carries; three figures where they are equal."""
    if distance > 0:
        return min(max(-math.floor(math.log10(distance)), 0), 4)
    return min(max(2 - math.floor(math.log10(abs(median))), 0), 4) if median else 0


def median_text(spread: Mapping[str, float] | None, divisor: float = 1.0) -> str:
    """The median alone, with the digits that its quartiles leave it."""
    return with_quartiles(spread, divisor).split(" (")[0]


def percent(value: float, places: int = 1) -> str:
    """A share in per cent, without the sign."""
    return f"{100 * value:.{places}f}"
