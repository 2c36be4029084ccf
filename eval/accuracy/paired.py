"""Paired comparison of a pruned run with the unpruned one on the same items, so that noise is not read as loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000


def compare_paired(tasks: Mapping[str, Any], full: Mapping[str, Any], seed: int = 0) -> dict[str, Any] | None:
    """Difference and ratio to the unpruned model with 95 % bootstrap intervals, and how many items turned right or wrong.

    `tasks` and `full` are stored results by task, with `samples` of `doc_id` and `score`. Items are resampled within
    each task, the same ones for both models; tasks weigh equally. None where some item has no score of its own, or where the
    two runs did not answer the same items.
    """
    pairs = paired_scores(tasks, full)
    if pairs is None:
        return None
    generator = np.random.default_rng(seed)
    differences, ratios = [], []
    for sign, scores in pairs:
        picks = generator.integers(0, len(scores), (RESAMPLES, len(scores)))
        means = scores[picks].mean(1)
        differences.append(sign * (means[:, 0] - means[:, 1]))
        above, below = (means[:, 0], means[:, 1]) if sign > 0 else (means[:, 1], means[:, 0])
        ratios.append(np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=below != 0))
    return {
        **counted_changes(pairs)._asdict(),
        "difference_95": _interval(np.mean(differences, axis=0)),
        "relative_95": _interval(np.mean(ratios, axis=0)),
    }


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


def _interval(values: np.ndarray) -> list[float] | None:
    if np.isnan(values).any():
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]
