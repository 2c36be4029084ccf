from __future__ import annotations

import numpy as np
import pytest

from vlmprune.eval.accuracy.against_baselines import compare_with_baselines
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


def cell(title, keep, scores, tokens=100):
    return {"title": title, "keep": keep, "tasks": {"a": task(scores)}, "cost": {"visual_tokens_after": tokens}}


def test_methods_against_baselines_at_the_same_budget():
    right, wrong = [1.0] * 40, [0.0] * 40
    results = [
        cell("full", None, right),
        cell("random", 0.5, wrong),
        cell("random", 0.1, right[:20] + wrong[20:]),
        cell("good", 0.5, right),
        cell("good", 0.1, wrong),
        cell("same", 0.1, right[:18] + wrong[18:]),
    ]
    found = {(c.method, c.keep): c for c in compare_with_baselines(results, ["random"])}
    assert {key: c.verdict for key, c in found.items()} == {
        ("good", 0.5): "better",
        ("good", 0.1): "worse",
        ("same", 0.1): "a tie",
    }
    assert (found["same", 0.1].better, found["same", 0.1].worse) == (0, 2)
    assert found["same", 0.1].difference == pytest.approx(-0.05)
    # Two of two: 0.5 by the exact sign test, and the largest of the three stays as it is.
    assert found["same", 0.1].chance == pytest.approx(0.5)


def test_many_comparisons_need_more_than_one_lucky_one():
    generator = np.random.default_rng(3)
    coins = [list((generator.random(100) < 0.5).astype(float)) for _ in range(60)]
    results = [cell("random", 0.5, coins[0]), *(cell(f"m{i}", 0.5, coin) for i, coin in enumerate(coins[1:]))]
    found = compare_with_baselines(results, ["random"])
    assert len(found) == 59
    assert all(comparison.verdict == "a tie" for comparison in found)


def test_cells_with_other_items_are_not_compared():
    results = [cell("random", 0.5, [1.0, 0.0]), cell("m", 0.5, [1.0, 0.0, 1.0])]
    assert compare_with_baselines(results, ["random"]) == []


def test_methods_that_leave_the_language_model_all_tokens_are_not_compared():
    results = [cell("random", 0.5, [1.0, 0.0]), cell("tower", 0.5, [1.0, 1.0], 200), cell("m", 0.5, [1.0, 1.0], 120)]
    assert [comparison.method for comparison in compare_with_baselines(results, ["random"])] == ["m"]
