"""Budgets of videos that the official codes round down."""

from __future__ import annotations

from typing import Literal

from vlmprune.budget import Keep, token_budget

Rounding = Literal["nearest", "down"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "down")


def video_tokens(keep: Keep, total: int, least: int, rounding: Rounding) -> int:
    """Return how many of a video's `total` tokens stay: `keep` of them, `least` at least and all at most.

    Args:
        keep: their share, or their number.
        total: tokens of the video.
        least: the method's floor.
        rounding: "nearest" as everywhere in this library, "down" truncates the float64 product as the official codes do.
    """
    budget = int(total * keep) if rounding == "down" and isinstance(keep, float) else token_budget(keep, total)
    return min(total, max(least, budget))
