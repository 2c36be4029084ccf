"""The items on which a method can show something: those that the same picture at a lower resolution gets wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vlmprune.eval.models.lower_resolution import LOWER_RESOLUTION

DOWNSAMPLED = (LOWER_RESOLUTION, "pool")
"""Cells that say which items need the full resolution: smaller pictures, else tokens pooled behind the tower."""
HALF = 0.5


def hard_items(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> tuple[float, int] | None:
    """Mean score of a cell on the items that downsampling to its budget gets wrong (a score below one half), and their number.

    None where no such cell of that budget was run, where it gets nothing wrong, or for tasks in which less is better.
    """
    other = next((found for title in DOWNSAMPLED if (found := _of_budget(title, result, results)) is not None), None)
    if other is None:
        return None
    scores = []
    for name, task in result["tasks"].items():
        if not task["higher_is_better"] or name not in other["tasks"]:
            return None
        mine = {sample["doc_id"]: sample["score"] for sample in task["samples"]}
        for sample in other["tasks"][name]["samples"]:
            if sample["score"] is not None and sample["score"] < HALF and mine.get(sample["doc_id"]) is not None:
                scores.append(mine[sample["doc_id"]])
    return (fmean(scores), len(scores)) if scores else None


def _of_budget(title: str, result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next(
        (each for each in results if each["title"] == title and repr(each["keep"]) == repr(result["keep"])), None
    )
