"""Splitting a budget over parts."""

from fractions import Fraction
from math import floor

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.methods.shared.apportion import apportion

rows = st.integers(1, 6).flatmap(
    lambda parts: st.tuples(
        st.lists(st.integers(0, 50), min_size=parts, max_size=parts),
        st.lists(st.floats(0, 100), min_size=parts, max_size=parts),
        st.integers(0, 200),
    )
)


@settings(deadline=None)
@given(row=rows)
def test_totals_are_exact_and_capacities_hold(row):
    capacities, weights, total = row
    split = apportion(torch.tensor([total]), torch.tensor([weights]), torch.tensor([capacities]))[0]
    assert int(split.sum()) == min(total, sum(capacities))
    assert (split >= 0).all()
    assert (split <= torch.tensor(capacities)).all()


@settings(deadline=None)
@given(row=rows)
def test_open_parts_are_within_one_of_their_share(row):
    capacities, weights, total = row
    split = apportion(torch.tensor([total]), torch.tensor([weights]), torch.tensor([capacities]))[0].tolist()
    free = [index for index, count in enumerate(split) if count < capacities[index] and weights[index] > 1e-3]
    left, weight = sum(split[index] for index in free), sum(weights[index] for index in free)
    assert all(abs(split[index] - left * weights[index] / weight) <= 1 for index in free)


def test_remainders_go_to_the_largest_and_then_the_first():
    def split(total, weights, capacities):
        return apportion(torch.tensor([total]), torch.tensor([weights]), torch.tensor([capacities]))[0].tolist()

    assert split(7, [1.0, 1.0, 1.0], [9, 9, 9]) == [3, 2, 2]
    assert split(10, [0.55, 0.25, 0.2], [99, 99, 99]) == [6, 2, 2]
    assert split(10, [8.0, 1.0, 1.0], [2, 9, 9]) == [2, 4, 4]
    assert split(5, [1.0, 0.0, 0.0], [3, 4, 4]) == [3, 1, 1]
    assert split(5, [0.0, 0.0], [4, 4]) == [3, 2]
    assert split(4, [float("nan"), 1.0], [4, 4]) == [0, 4]
    assert split(9, [1.0, 1.0], [2, 3]) == [2, 3]


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    capacities=st.lists(st.integers(0, 60), min_size=6, max_size=6),
    total=st.integers(0, 120),
)
def test_splits_equal_those_of_fractions(weights, capacities, total):
    capacities = capacities[: len(weights)]
    split = apportion(torch.tensor([total]), torch.tensor([weights]), torch.tensor([capacities]))[0].tolist()
    assert split == exact_split(total, weights, capacities)


def exact_split(total, weights, capacities):
    """The same rule in exact arithmetic: full parts leave, the largest remainder goes first, then the lowest index."""
    result, open_parts = [0] * len(weights), [index for index, weight in enumerate(weights) if weight]
    left = min(total, sum(capacities[index] for index in open_parts))
    rest = total - left
    while True:
        weight = sum(weights[index] for index in open_parts)
        shares = {index: Fraction(left * weights[index], weight) for index in open_parts}
        full = [index for index in open_parts if shares[index] >= capacities[index]]
        if not full:
            break
        for index in full:
            result[index] = capacities[index]
            left -= capacities[index]
            open_parts.remove(index)
    remainders = sorted(open_parts, key=lambda index: (floor(shares[index]) - shares[index], index))
    for index in open_parts:
        result[index] = floor(shares[index])
    for index in remainders[: left - sum(floor(share) for share in shares.values())]:
        result[index] += 1
    last = [index for index, weight in enumerate(weights) if not weight]
    if last and rest:
        evenly = exact_split(rest, [1] * len(last), [capacities[index] for index in last])
        for index, count in zip(last, evenly, strict=True):
            result[index] = count
    return result


def test_exact_ties_go_to_the_lowest_index():
    def split(total, weights):
        return apportion(torch.tensor([total]), torch.tensor([weights]), torch.full((1, len(weights)), 9))[0].tolist()

    assert split(2, [3, 1]) == [2, 0]
    assert split(2, [1, 3]) == [1, 1]
    assert split(4, [4, 1, 1]) == [3, 1, 0]
    assert split(2, [1.0, 0.1, 0.1, 0.1]) == [2, 0, 0, 0]


def test_rows_do_not_mix():
    totals, weights = torch.tensor([3, 8]), torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    assert apportion(totals, weights, torch.tensor([[5, 5], [2, 9]])).tolist() == [[1, 2], [2, 6]]
