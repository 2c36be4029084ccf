"""Methods against the cheap baselines and each other at one budget, item by item, with a correction for how many are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy.stats import binomtest, false_discovery_control, norm

from .paired import Changes, counted_changes, paired_scores

Result = Mapping[str, Any]

SIGNIFICANCE = 0.05
MORE_TOKENS = 1.4
Verdict = Literal["better", "worse", "a tie"]


@dataclass(frozen=True)
class Comparison:
    """One method against one baseline at one budget.

    Attributes:
        method: title of the method's cell.
        baseline: title of the baseline's cell.
        keep: the budget of both.
        difference: mean score over tasks, minus the baseline's.
        better: items on which the method scores higher.
        worse: items on which it scores lower.
        chance: probability of a split at least as uneven as `better` to `worse` between equals (exact sign test; where items
            change by different amounts, as against the mean of several seeds, of such a mean change), adjusted for all
            comparisons made together (Benjamini and Hochberg's false discovery rate).
    """

    method: str
    baseline: str
    keep: float | int
    difference: float
    better: int
    worse: int
    chance: float

    @property
    def verdict(self) -> Verdict:
        """What the items say: a tie unless the split is too uneven for chance and agrees with the mean."""
        if not self.chance <= SIGNIFICANCE or not self.difference:
            return "a tie"
        return "better" if self.difference > 0 else "worse"


def compare_with_baselines(results: Sequence[Result], baselines: Sequence[str]) -> list[Comparison]:
    """Compare every finished cell with the baselines at its budget.

    Args:
        results: stored cells, each with `title`, `keep` and `tasks`.
        baselines: titles of the baselines' cells.

    Returns:
        The comparisons in the order of `results`. Cells without a budget are left out, those that leave the language model far
        more tokens than the baseline (methods that make only the vision tower cheaper), and pairs that did not answer the same
        items with scores of their own.
    """
    return _compared(
        (result, baseline)
        for result in results
        for baseline in results
        if result["title"] not in baselines
        and baseline["title"] in baselines
        and _tokens(result) <= MORE_TOKENS * _tokens(baseline)
    )


def compare_all(results: Sequence[Result]) -> list[Comparison]:
    """Compare every two finished cells of one budget; `baseline` is then just the other one, which comes first in `results`.

    Pairs of which one leaves the language model far more tokens than the other are left out, as in `compare_with_baselines`.
    """
    return _compared(
        (result, other)
        for other, result in combinations(results, 2)
        if max(_tokens(result), _tokens(other)) <= MORE_TOKENS * min(_tokens(result), _tokens(other))
    )


def _compared(pairs: Iterable[tuple[Result, Result]]) -> list[Comparison]:
    found: list[tuple[Result, Result, Changes]] = []
    chances: list[float] = []
    for result, other in pairs:
        if result["keep"] is None or repr(result["keep"]) != repr(other["keep"]):
            continue
        scores = paired_scores(result["tasks"], other["tasks"])
        if scores is not None:
            found.append((result, other, counted_changes(scores)))
            chances.append(chance_of(scores))
    adjusted = false_discovery_control(chances) if chances else []
    return [
        Comparison(
            method=result["title"],
            baseline=other["title"],
            keep=result["keep"],
            difference=changes.difference,
            better=changes.better,
            worse=changes.worse,
            chance=float(chance),
        )
        for (result, other, changes), chance in zip(found, adjusted, strict=True)
    ]


def chance_of(pairs: Sequence[tuple[float, np.ndarray]]) -> float:
    """Probability of changes at least as uneven as those of `paired_scores` between equals.

    The exact sign test where every change is as large as any other and points the way of the mean; where they differ in size, the
    normal approximation for the mean over tasks.
    """
    tasks = [sign * (scores[:, 0] - scores[:, 1]) for sign, scores in pairs]
    each = np.concatenate(tasks)
    changed = each[each != 0]
    if not len(changed):
        return 1.0
    mean = float(np.mean([task.mean() for task in tasks]))
    if np.ptp(np.abs(changed)) < 1e-9:
        better = int((changed > 0).sum())
        agree = mean * (2 * better - len(changed)) > 0
        return float(binomtest(better, len(changed)).pvalue) if agree else 1.0
    variance = sum(float(task.var(ddof=1)) / len(task) if len(task) > 1 else np.inf for task in tasks) / len(tasks) ** 2
    return float(2 * norm.sf(abs(mean) / np.sqrt(variance))) if variance else 0.0


def _tokens(result: Result) -> float:
    tokens: float = result["cost"]["visual_tokens_after"]
    return tokens
