"""Paired comparison of a pruned run with the unpruned one on the same items, so that noise is not read as loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .paired_intervals import difference_interval, ratio_interval

NO_ITEM_SCORES = "no score for each item"
OTHER_ITEMS = "other items were answered"
FULL_NEAR_ZERO = "none: the full model's score cannot be told from 0"
BOTH_DIRECTIONS = "none: more is better in some tasks, less in others"


def compare_paired(tasks: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """Difference and ratio of the means, with 95 % intervals, and how many items turned right or wrong.

    `tasks` and `full` are stored results by task, with `samples` of `doc_id` and `score`. Tasks weigh equally. `ratio` is the
    mean of the scores over the full model's mean (turned round where less is better), and `ratio_95` its interval; where
    one of them does not exist it is None, and `ratio_reason` says why. Where nothing can be compared the result is
    `{"reason": words}`.
    """
    pairs = paired_scores(tasks, full)
    if pairs is None:
        return {"reason": why_not_paired(tasks, full)}
    scores = [task for _, task in pairs]
    signs = {sign for sign, _ in pairs}
    scale = largest_change(scores)
    low, high = difference_interval([sign * task for sign, task in pairs], scale)
    result: dict[str, Any] = {
        **counted_changes(pairs)._asdict(),
        "difference_95": [low, high],
        "ratio": None,
        "ratio_95": None,
        "ratio_reason": None,
    }
    if len(signs) > 1:
        return {**result, "ratio_reason": BOTH_DIRECTIONS}
    ordered = scores if signs == {1.0} else [task[:, ::-1] for task in scores]
    above, below = np.mean([task.mean(0) for task in ordered], axis=0)
    interval = ratio_interval(ordered, scale)
    return {
        **result,
        "ratio": float(above / below) if below else None,
        "ratio_95": list(interval) if interval else None,
        "ratio_reason": None if interval else FULL_NEAR_ZERO,
    }


def why_not_paired(tasks: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """Why `paired_scores` gives nothing for two runs."""
    for name, task in tasks.items():
        ours = {sample["doc_id"] for sample in task["samples"]}
        if ours != {sample["doc_id"] for sample in full.get(name, {}).get("samples", [])}:
            return OTHER_ITEMS
    return NO_ITEM_SCORES


def largest_change(scores: Sequence[np.ndarray]) -> float:
    """The largest change that an item can make: 1 for scores between 0 and 1, else the range that was seen."""
    seen = np.concatenate(scores)
    low, high = min(0.0, float(seen.min())), max(0.0, float(seen.max()))
    return 1.0 if low == 0 and high <= 1 else high - low


class Changes(NamedTuple):
    """How two runs differ, item by item.

    Attributes:
        items: how many.
        better: on which the first scores higher.
        worse: on which it scores lower.
        difference: mean over tasks of its mean score, minus the other's.
    """

    items: int
    better: int
    worse: int
    difference: float


def counted_changes(pairs: Sequence[tuple[float, np.ndarray]]) -> Changes:
    """Count the items of `paired_scores` on which two runs differ."""
    changes = [sign * (scores[:, 0] - scores[:, 1]) for sign, scores in pairs]
    each = np.concatenate(changes)
    difference = float(np.mean([task.mean() for task in changes]))
    return Changes(len(each), int((each > 0).sum()), int((each < 0).sum()), difference)


def paired_scores(tasks: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[float, np.ndarray]] | None:
    """Return for every task the sign that makes more better, and `[items, 2]`, the scores of both runs.

    None where some item has no score of its own, or where the two runs did not answer the same items.
    """
    pairs = []
    for name, task in tasks.items():
        ours = {sample["doc_id"]: sample["score"] for sample in task["samples"]}
        theirs = {sample["doc_id"]: sample["score"] for sample in other.get(name, {}).get("samples", [])}
        if not ours or ours.keys() != theirs.keys() or None in ours.values() or None in theirs.values():
            return None
        sign = 1.0 if task["higher_is_better"] else -1.0
        pairs.append((sign, np.array([[ours[key], theirs[key]] for key in ours], dtype=float)))
    return pairs
