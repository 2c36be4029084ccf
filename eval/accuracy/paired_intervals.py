"""Intervals for the difference and the ratio of two runs on the same items that stay honest when few items changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class TaskMoments:
    """Mean [2] and covariance of that mean [2, 2] of the scores of both runs on one task, with the added items in them."""

    mean: np.ndarray
    covariance: np.ndarray


def task_moments(scores: np.ndarray, tasks: int, scale: float) -> TaskMoments:
    """Moments of one task's paired scores, with one changed item in each direction added over all tasks.

    Adding an item that turned right and one that turned wrong is Bonett and Price's adjusted Wald interval for paired
    proportions (doi 10.3102/1076998611411915), Agresti and Coull's idea for pairs: at no change in n items the interval is about
    plus or minus 2.8 / n, where a bootstrap or Wald interval has no width. The two are shared out among tasks that weigh alike.

    Args:
        scores: `[items, 2]`.
        tasks: number of tasks that share the added items.
        scale: the largest change that an item can make.
    """
    weight = 1.0 / tasks
    added = np.array([[scale, 0.0], [0.0, scale]])
    total = len(scores) + 2 * weight
    mean = (scores.sum(0) + weight * added.sum(0)) / total
    centred, centred_added = scores - mean, added - mean
    spread = (centred.T @ centred + weight * centred_added.T @ centred_added) / total
    return TaskMoments(mean, spread / total)


def mean_moments(tasks: Sequence[np.ndarray], scale: float) -> TaskMoments:
    """The same of the mean over tasks, each `[items, 2]`, which weigh alike."""
    parts = [task_moments(scores, len(tasks), scale) for scores in tasks]
    covariance = np.sum([part.covariance for part in parts], axis=0) / len(parts) ** 2
    return TaskMoments(np.mean([part.mean for part in parts], axis=0), covariance)


def difference_interval(
    tasks: Sequence[np.ndarray], scale: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of the first run's mean score minus the second's."""
    moments = mean_moments(tasks, scale)
    contrast = np.array([1.0, -1.0])
    middle = float(contrast @ moments.mean)
    width = quantile(confidence) * float(np.sqrt(contrast @ moments.covariance @ contrast))
    return max(middle - width, -scale), min(middle + width, scale)


def ratio_interval(
    tasks: Sequence[np.ndarray], scale: float, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """The interval of the first run's mean score over the second's (Fieller's theorem on the same moments).

    None where the second's mean cannot be told from 0, so that no finite interval holds.
    """
    moments = mean_moments(tasks, scale)
    squared = quantile(confidence) ** 2
    (above, below), covariance = moments.mean, moments.covariance
    a = below**2 - squared * covariance[1, 1]
    b = above * below - squared * covariance[0, 1]
    c = above**2 - squared * covariance[0, 0]
    inside = b**2 - a * c
    if a <= 0 or inside < 0:
        return None
    root = float(np.sqrt(inside))
    return max((b - root) / a, 0.0), (b + root) / a


def share_interval(successes: int, items: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a share."""
    found = binomtest(successes, items).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean of numbers of any size by bootstrap (percentiles)."""
    numbers = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(numbers), (RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[picks].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def quantile(confidence: float) -> float:
    """The normal quantile of a two-sided interval."""
    return float(norm.ppf((1 + confidence) / 2))
