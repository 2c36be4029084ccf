from __future__ import annotations

import numpy as np
import pytest

from vlmprune.eval.accuracy.against_baselines import chance_of, compare_all, compare_with_baselines
from vlmprune.eval.accuracy.paired import compare_paired
from vlmprune.eval.accuracy.paired_intervals import difference_interval, ratio_interval
from vlmprune.eval.reports.seeds import merge_seeds


def task(scores, higher_is_better=True):
    samples = [{"doc_id": i, "score": score} for i, score in enumerate(scores)]
    return {"samples": samples, "higher_is_better": higher_is_better}


def test_equal_runs_differ_by_nothing():
    result = compare_paired({"a": task([1, 0, 1])}, {"a": task([1, 0, 1])})
    assert result["difference"] == 0
    low, high = result["difference_95"]
    assert -1 < low < -0.3
    assert high == pytest.approx(-low)
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
    below, above = result["ratio_95"]
    assert result["ratio"] == pytest.approx(pruned.mean() / full.mean())
    assert below < result["ratio"] < above


def test_tasks_weigh_equally_and_less_can_be_better():
    tasks = {"big": task([1.0] * 90), "error": task([0.2] * 10, higher_is_better=False)}
    full = {"big": task([1.0] * 90), "error": task([0.1] * 10, higher_is_better=False)}
    result = compare_paired(tasks, full)
    assert result["difference"] == pytest.approx(-0.05)
    assert result["worse"] == 10
    assert (result["ratio"], result["ratio_95"]) == (None, None)
    assert "less in others" in result["ratio_reason"]
    error = {"error": tasks["error"]}
    assert compare_paired(error, {"error": full["error"]})["ratio"] == pytest.approx(0.5)


def test_nothing_is_said_without_scores_of_the_same_items():
    assert compare_paired({"a": task([1, None])}, {"a": task([1, 0])}) == {"reason": "no score for each item"}
    assert compare_paired({"a": task([1, 0, 1])}, {"a": task([1, 0])}) == {"reason": "other items were answered"}
    assert compare_paired({"a": task([1])}, {}) == {"reason": "other items were answered"}
    zero = compare_paired({"a": task([0, 0])}, {"a": task([0, 0])})
    assert (zero["ratio"], zero["ratio_95"]) == (None, None)
    assert "cannot be told from 0" in zero["ratio_reason"]
    assert zero["difference_95"][0] < 0 < zero["difference_95"][1]


@pytest.mark.parametrize("tasks", [1, 5])
@pytest.mark.parametrize(("items", "lost", "won"), [(2, 0.0, 0.0), (10, 0.2, 0.05), (30, 0.02, 0.0), (30, 0.3, 0.1)])
def test_intervals_hold_the_truth_often_enough_in_small_samples(tasks, items, lost, won):
    generator = np.random.default_rng(items)
    right = 0.9
    truth = right * (1 - lost) + (1 - right) * won
    runs, held, held_ratio = 300, 0, 0
    for _ in range(runs):
        full = generator.random((tasks, items)) < right
        pruned = np.where(full, generator.random((tasks, items)) >= lost, generator.random((tasks, items)) < won)
        scores = list(np.stack([pruned, full], -1).astype(float))
        low, high = difference_interval(scores, 1.0)
        held += low <= truth - right <= high
        ratio = ratio_interval(scores, 1.0)
        held_ratio += ratio is None or ratio[0] <= truth / right <= ratio[1]
    assert min(held, held_ratio) >= 0.92 * runs


def test_one_task_without_a_right_answer_leaves_the_interval():
    tasks = {"easy": task([1] * 20), "hard": task([0] * 20)}
    result = compare_paired(tasks, {"easy": task([1] * 20), "hard": task([0] * 19 + [1])})
    low, high = result["ratio_95"]
    assert low < result["ratio"] < 1 < high


def test_scores_beyond_one_widen_the_interval_by_their_range():
    one = compare_paired({"a": task([0, 1, 1])}, {"a": task([1, 1, 1])})
    hundred = compare_paired({"a": task([0, 100, 100])}, {"a": task([100, 100, 100])})
    assert hundred["difference_95"] == pytest.approx([100 * value for value in one["difference_95"]])
    assert hundred["ratio_95"] == pytest.approx(one["ratio_95"])


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


def test_all_methods_of_a_budget_are_compared_and_ties_are_named():
    right, wrong = [1.0] * 40, [0.0] * 40
    results = [
        cell("a", 0.5, right),
        cell("b", 0.5, right[:39] + wrong[39:]),
        cell("c", 0.5, wrong),
        cell("a", 1, right),
    ]
    found = {(c.method, c.baseline): c.verdict for c in compare_all(results)}
    assert found == {("b", "a"): "a tie", ("c", "a"): "worse", ("c", "b"): "worse"}


def test_a_count_and_a_share_are_not_the_same_budget():
    assert compare_all([cell("a", 1, [1.0]), cell("b", 1.0, [1.0])]) == []


def test_against_the_mean_of_seeds_the_size_of_a_change_counts():
    # Right where the mean is 2/3, wrong where it is 2/3: as many better as worse, and the mean says worse.
    mean = np.array([[1.0, 2 / 3]] * 60 + [[0.0, 2 / 3]] * 60)
    assert chance_of([(1.0, mean)]) < 0.01
    even = np.array([[1.0, 2 / 3]] * 40 + [[0.0, 2 / 3]] * 20)
    assert chance_of([(1.0, even)]) > 0.9


def test_seeds_become_one_row_with_their_mean_and_spread():
    first = {**cell("random", 0.5, [1.0, 0.0]), "label": "random keep=0.5"}
    second = {**cell("random:seed=1", 0.5, [1.0, 1.0]), "label": "random:seed=1 keep=0.5", "repeats": "random keep=0.5"}
    for result in (first, second):
        result["tasks"]["a"]["score"] = float(np.mean([s["score"] for s in result["tasks"]["a"]["samples"]]))
    (merged,) = merge_seeds([first, second])
    assert merged["seeds"] == [0.5, 1.0]
    assert merged["tasks"]["a"]["score"] == 0.75
    assert [sample["score"] for sample in merged["tasks"]["a"]["samples"]] == [1.0, 0.5]
    assert merge_seeds([second]) == [second]
