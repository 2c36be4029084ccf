"""The one rule that turns `keep` into a number of visual tokens."""

from __future__ import annotations

import math
from numbers import Integral, Real

from .errors import BudgetError

Keep = float | int


def check_keep(keep: object) -> Keep:
    """Return `keep` as a float in (0, 1] or a positive int.

    Raises:
        BudgetError: for anything else (0, negative numbers, floats above 1, NaN, booleans, strings).
    """
    allowed = "a float in (0, 1] (share of visual tokens kept) or an int >= 1 (visual tokens kept per image)"
    if isinstance(keep, bool) or not isinstance(keep, Real):
        by_row = " A budget for each row: `with vlmprune.options(model, keep=[...])`." if isinstance(keep, list) else ""
        raise BudgetError(f"keep={keep!r} is of type {type(keep).__name__}; allowed: {allowed}.{by_row}")
    if isinstance(keep, Integral):
        count = int(keep)
        if count < 1:
            raise BudgetError(f"keep={keep!r} keeps no visual token; allowed: {allowed}; nearest: 1.")
        return count
    share = float(keep)
    if math.isnan(share):
        raise BudgetError(f"keep={keep!r} is not a number; allowed: {allowed}.")
    if share <= 0:
        raise BudgetError(f"keep={keep!r} keeps no visual token; allowed: {allowed}.")
    if share > 1:
        nearest = f"keep={int(share)} for a count" if share.is_integer() else "keep=1.0"
        raise BudgetError(f"keep={keep!r} is a share above 1; allowed: {allowed}; nearest: {nearest}.")
    return share


def token_budget(keep: Keep, total: int) -> int:
    """Return how many of an image's `total` visual tokens are kept.

    `keep` if it is a count (at most `total`), else `max(1, round(keep * total))` with halves rounded to even.
    `total` counts the visual tokens as the language model would see them: all tiles, newline tokens included.
    """
    if total == 0:
        return 0
    count = keep if isinstance(keep, int) else round(keep * total)
    return min(max(1, count), total)
