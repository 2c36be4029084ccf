from __future__ import annotations

import numpy as np
import pytest

from vlmprune.eval.accuracy.paired import compare_paired


def task(scores, higher_is_better=True):
    samples = [{"doc_id": i, "score": score} for i, score in enumerate(scores)]
    return {"samples": samples, "higher_is_better": higher_is_better}


def test_equal_runs_differ_by_nothing():
    result = compare_paired({"a": task([1, 0, 1])}, {"a": task([1, 0, 1])})
    assert result["difference"] == 0
    assert result["difference_95"] == [0, 0]
    assert (result["better"], result["worse"], result["items"]) == (0, 0, 3)


def test_the_interval_is_that_of_paired_differences():
    generator = np.random.default_rng(0)
    full = (generator.random(400) < 0.9).astype(float)
    pruned = np.where(generator.random(400) < 0.1, 1 - full, full)
    result = compare_paired({"a": task(pruned)}, {"a": task(full)})
    low, high = result["difference_95"]
    change = pruned - full
    error = change.std() / np.sqrt(400)
    assert result["difference"] == pytest.approx(change.mean())
    assert low == pytest.approx(change.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(change.mean() + 1.96 * error, abs=0.2 * error)
    assert result["better"] - result["worse"] == change.sum()
    below, above = result["relative_95"]
    assert below < pruned.mean() / full.mean() < above


def test_tasks_weigh_equally_and_less_can_be_better():
    tasks = {"big": task([1.0] * 90), "error": task([0.2] * 10, higher_is_better=False)}
    full = {"big": task([1.0] * 90), "error": task([0.1] * 10, higher_is_better=False)}
    result = compare_paired(tasks, full)
    assert result["difference"] == pytest.approx(-0.05)
    assert result["relative_95"] == pytest.approx([0.75, 0.75])
    assert result["worse"] == 10


def test_nothing_is_said_without_scores_of_the_same_items():
    assert compare_paired({"a": task([1, None])}, {"a": task([1, 0])}) is None
    assert compare_paired({"a": task([1, 0, 1])}, {"a": task([1, 0])}) is None
    assert compare_paired({"a": task([1])}, {}) is None
    assert compare_paired({"a": task([0, 0])}, {"a": task([0, 0])})["relative_95"] is None
