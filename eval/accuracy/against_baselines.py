"""Methods against the cheap baselines at the same budget, item by item, with a correction for how many are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import binomtest, false_discovery_control

from .paired import Changes, counted_changes, paired_scores

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
        chance: probability of a split at least as uneven as `better` to `worse` between equals (exact sign test), adjusted
            for all comparisons of the benchmark (Benjamini and Hochberg's false discovery rate).
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
        if self.chance > SIGNIFICANCE or self.difference * (self.better - self.worse) <= 0:
            return "a tie"
        return "better" if self.difference > 0 else "worse"


def compare_with_baselines(results: Sequence[Mapping[str, Any]], baselines: Sequence[str]) -> list[Comparison]:
    """Compare every finished cell with the baselines at its budget.

    Args:
        results: stored cells, each with `title`, `keep` and `tasks`.
        baselines: titles of the baselines' cells.

    Returns:
        The comparisons in the order of `results`. Cells without a budget are left out, those that leave the language model far
        more tokens than the baseline (methods that make only the vision tower cheaper), and pairs that did not answer the same
        items with scores of their own.
    """
    found: list[tuple[Mapping[str, Any], Mapping[str, Any], Changes]] = []
    for result in results:
        for baseline in results:
            if result["keep"] is None or result["title"] in baselines:
                continue
            if baseline["title"] not in baselines or baseline["keep"] != result["keep"]:
                continue
            if _tokens(result) > MORE_TOKENS * _tokens(baseline):
                continue
            pairs = paired_scores(result["tasks"], baseline["tasks"])
            if pairs is not None:
                found.append((result, baseline, counted_changes(pairs)))
    chances = [_chance(changes) for _, _, changes in found]
    adjusted = false_discovery_control(chances) if chances else []
    return [
        Comparison(
            method=result["title"],
            baseline=baseline["title"],
            keep=result["keep"],
            difference=changes.difference,
            better=changes.better,
            worse=changes.worse,
            chance=float(chance),
        )
        for (result, baseline, changes), chance in zip(found, adjusted, strict=True)
    ]


def _chance(changes: Changes) -> float:
    differing = changes.better + changes.worse
    return float(binomtest(changes.better, differing).pvalue) if differing else 1.0


def _tokens(result: Mapping[str, Any]) -> float:
    tokens: float = result["cost"]["visual_tokens_after"]
    return tokens
