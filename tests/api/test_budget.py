"""The budget rule and the errors of `keep`."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmprune.budget import check_keep, token_budget
from vlmprune.errors import BudgetError


@pytest.mark.parametrize(
    "keep", [0, 0.0, -1, -0.5, 1.5, 2.0, 576.0, math.nan, math.inf, True, False, "0.5", None, [0.5], 1j]
)
def test_bad_keep_is_refused(keep):
    with pytest.raises(BudgetError, match=r"allowed: a float in \(0, 1\]"):
        check_keep(keep)


def test_error_names_the_value_and_the_nearest():
    with pytest.raises(BudgetError, match=r"keep=576\.0 .* nearest: keep=576 for a count"):
        check_keep(576.0)
    with pytest.raises(BudgetError, match=r"keep=1\.5 .* nearest: keep=1\.0"):
        check_keep(1.5)


@pytest.mark.parametrize("keep", [1, 64, 0.5, 1.0, np.int64(7), np.float32(0.25)])
def test_good_keep_is_taken(keep):
    assert check_keep(keep) == keep
    assert isinstance(check_keep(keep), (int, float))


@pytest.mark.parametrize(
    ("keep", "total", "budget"),
    [(0.098, 576, 56), (0.098, 2880, 282), (0.5, 577, 288), (0.5, 575, 288), (0.25, 576, 144), (64, 576, 64), (64, 20, 20),
     (0.001, 576, 1), (1.0, 576, 576), (0.3, 0, 0)],
)  # fmt: skip
def test_budget_rule(keep, total, budget):
    assert token_budget(keep, total) == budget


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 40_000))
def test_share_is_monotone_and_in_range(keep, total):
    budget = token_budget(keep, total)
    assert 1 <= budget <= total
    assert abs(budget - keep * total) <= 0.5 or budget == 1
