"""Schedules of methods that remove about as many tokens in every block."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmprune.errors import BudgetError
from vlmprune.methods import ToMe
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.encoder.tome import removals
from vlmprune.methods.encoder_method import block_tokens
from vlmprune.methods.shared.merge_schedule import counts_after, plan_for_keep


@given(patches=st.integers(1, 600), blocks=st.integers(1, 30), merged=st.booleans(), data=st.data())
def test_every_budget_that_can_be_reached_is_met_exactly(patches, blocks, merged, data):
    lowest = counts_after(patches, [patches] * blocks)
    keep = data.draw(st.one_of(st.floats(0.01, 1.0), st.integers(1, patches)))
    wanted = keep if isinstance(keep, int) else keep * patches
    try:
        counts = plan_for_keep(keep, merged, patches, blocks)
    except BudgetError:
        assert round(wanted) < lowest[-1] if merged else wanted < sum(lowest) / blocks
        return
    before = (patches, *counts[:-1])
    assert all(0 <= first - then <= first // 2 for first, then in zip(before, counts, strict=True))
    if merged:
        assert counts[-1] == max(1, round(wanted))
    else:
        assert sum(counts) == max(blocks, round(wanted * blocks))


def test_removals_differ_by_one():
    counts = (576, *plan_for_keep(192, True, 576, 23))
    assert {first - then for first, then in pairwise(counts)} == {16, 17}
    counts = (576, *plan_for_keep(0.7, False, 576, 23))
    assert len({first - then for first, then in pairwise(counts)}) <= 2
    assert sum(counts[1:]) == round(0.7 * 576 * 23)


@pytest.mark.parametrize(
    ("r", "inflection", "expected"),
    [
        (8, 0.0, [8] * 4),
        (8, -1.0, [16, 10, 5, 0]),
        (8, 1.0, [0, 5, 10, 16]),
        (7, 0.5, [3, 5, 8, 11]),
        ((5, 3), 0.0, [5, 3, 0, 0]),
    ],
)
def test_the_papers_schedules(r, inflection, expected):
    assert removals(r, inflection, 4) == expected


def test_tokens_by_block():
    method = ToMe(r=(4, 4))
    tower = TowerFacts(layers=3, feature_layer=1, has_cls=True)
    assert block_tokens(method, 16, tower) == ((16, 12), (12, 8), (8, 8))
    assert block_tokens(ToMe(keep=1.0), 16, tower) == ((16, 16),) * 3
