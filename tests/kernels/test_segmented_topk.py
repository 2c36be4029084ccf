"""Top-k of ragged segments."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels.segmented_topk import segmented_topk

NAN, INF = math.nan, math.inf


def oracle(scores: torch.Tensor, offsets: list[int], k: list[int], order: str) -> list[int]:
    picks = []
    for (begin, end), count in zip(pairwise(offsets), k, strict=True):
        values = scores[begin:end].float().tolist()
        ranked = sorted(range(end - begin), key=lambda i: (math.isnan(values[i]), -values[i], i))
        # Sorting with NaN among the keys is not defined, so they go last by hand.
        numbers = [i for i in ranked if not math.isnan(values[i])]
        numbers.sort(key=lambda i: (-values[i], i))
        ranked = numbers + sorted(set(range(end - begin)) - set(numbers))
        picks += sorted(ranked[:count]) if order == "position" else ranked[:count]
    return picks


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("length", [1, 7, 63, 577, 2880, 10000])
def test_reference(length: int, order: str) -> None:
    quantised = torch.randn(length).mul(4).round()
    for scores in (torch.randn(length), quantised, quantised.half()):
        for count in {1, length // 4, length}:
            picks = segmented_topk(scores, [0, length], [count], order=order)
            assert picks.tolist() == oracle(scores, [0, length], [count], order)


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("length", [1, 63, 577, 10000])
def test_kernel(length: int, order: str, device: str) -> None:
    scores = torch.randn(length).mul(4).round()
    count = max(1, min(length // 4, 700))
    picks = segmented_topk(scores.to(device), [0, length], [count], order=order, implementation="triton")
    assert torch.equal(picks.cpu(), segmented_topk(scores, [0, length], [count], order=order))


SPECIAL = torch.tensor([1.0, NAN, INF, -INF, 0.0, -0.0, NAN, 1.0, -INF, INF, -1.0, 3e-45, -3e-45])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("order", ["position", "score"])
def test_nan_is_last_and_infinities_are_numbers(order: str, implementation: str, device: str) -> None:
    scores = torch.cat([SPECIAL, SPECIAL.flip(0)])
    offsets, k = [0, len(SPECIAL), 2 * len(SPECIAL)], [9, len(SPECIAL)]
    picks = segmented_topk(scores.to(device), offsets, k, order=order, implementation=implementation)
    assert picks.tolist() == oracle(scores, offsets, k, order)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_ragged_strided_segments_with_empty_ones(implementation: str, device: str) -> None:
    scores = torch.randn(800, 2, dtype=torch.bfloat16)[:, 1]
    offsets, k = [0, 0, 1, 8, 8, 71, 800], [0, 1, 7, 0, 0, 300]
    picks = segmented_topk(scores.to(device), offsets, k, order="score", implementation=implementation)
    assert picks.tolist() == oracle(scores, offsets, k, "score")


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_counts_on_the_device(implementation: str, device: str) -> None:
    scores = torch.randn(100, device=device)
    offsets, k = [0, 30, 30, 100], [4, 0, 9]
    expected = segmented_topk(scores, offsets, k, implementation="torch")
    tensors = torch.tensor(offsets, device=device), torch.tensor(k, device=device)
    assert torch.equal(segmented_topk(scores, *tensors, total=13, implementation=implementation), expected)
    assert torch.equal(segmented_topk(scores, *tensors, implementation=implementation), expected)


@pytest.mark.parametrize("order", ["position", "score"])
def test_kernel_marks_the_surplus_of_an_unchecked_count(order: str, device: str) -> None:
    offsets, k = torch.tensor([0, 2, 6], device=device), torch.tensor([4, 1], device=device)
    scores = torch.arange(6.0, device=device)
    picks = segmented_topk(scores, offsets, k, order=order, total=5, implementation="triton")
    assert picks.tolist() == ([0, 1] if order == "position" else [1, 0]) + [-1, -1, 3]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_reference_on_any_shape(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=6))
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    k = [data.draw(st.integers(0, length)) for length in lengths]
    number = st.floats(width=32, allow_nan=True, allow_infinity=True)
    scores = torch.tensor(data.draw(st.lists(number, min_size=offsets[-1], max_size=offsets[-1])))
    for order in ("position", "score"):
        assert segmented_topk(scores, offsets, k, order=order).tolist() == oracle(scores, offsets, k, order)


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4))
@settings(max_examples=5, deadline=None)
def test_kernel_on_any_shape(device: str, seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    k = [int(torch.randint(0, length + 1, (1,), generator=generator)) for length in lengths]
    scores = torch.randint(-5, 6, (offsets[-1],), generator=generator).float().to(device)
    picks = segmented_topk(scores, offsets, k, implementation="triton")
    assert torch.equal(picks, segmented_topk(scores, offsets, k, implementation="torch"))


def test_no_segment_sees_another() -> None:
    scores = torch.randn(200)
    expected = segmented_topk(scores, [0, 50, 200], [9, 30])
    scores[:50] = NAN
    assert torch.equal(segmented_topk(scores, [0, 50, 200], [9, 30])[9:], expected[9:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 3), [0, 6], [1]), "one-dimensional"),
        (((6,), [0, 5], [1]), "end with the number of rows 6"),
        (((6,), [1, 6], [1]), "begin with 0"),
        (((6,), [0, 4, 3, 6], [1, 1, 1]), "never fall"),
        (((6,), [0, 6], [7]), r"k\[0\] = 7 is not in 0..6"),
        (((6,), [0, 6], [-1]), r"k\[0\] = -1"),
        (((6,), [0, 6], [1, 1]), "2 counts for 1 segments"),
    ],
)
def test_bad_arguments(arguments: tuple[tuple[int, ...], list[int], list[int]], message: str) -> None:
    shape, offsets, k = arguments
    with pytest.raises(ValueError, match=message):
        segmented_topk(torch.zeros(shape), offsets, k)


def test_bad_order() -> None:
    with pytest.raises(ValueError, match="'rank' is not one of position, score"):
        segmented_topk(torch.zeros(3), [0, 3], [1], order="rank")
