"""Greedy coverage: by cosines and from given values."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.greedy_oracle import exact_cosines, tied_features
from vlmprune.kernels.coverage import coverage, coverage_reference, coverage_triton
from vlmprune.kernels.coverage_from_values import coverage_from_values


def oracle(values: Tensor, k: int, weights: Tensor | None = None, combine: str = "multiply") -> list[int]:
    """The sheets' loop: the gain of every token again at every step, never a token twice."""
    values = values.double()
    cover, picks = torch.zeros(values.shape[1]).double(), []
    while len(picks) < k:
        score = (values - cover).clamp(min=0).sum(1)
        if weights is not None:
            score = score * weights.double() if combine == "multiply" else score + weights.double()
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
        cover = torch.maximum(cover, values[picks[-1]])
    return picks


def quarters(tokens: int) -> Tensor:
    return torch.randint(0, 5, (tokens,)) / 4.0


@pytest.mark.parametrize("combine", ["none", "multiply", "add"])
@pytest.mark.parametrize("limit", [0, 10**9], ids=["from-features", "from-matrix"])
@pytest.mark.parametrize("tokens", [1, 7, 63, 300])
def test_reference_is_exact_on_ties(tokens: int, limit: int, combine: str) -> None:
    features = tied_features(tokens)
    weights = None if combine == "none" else quarters(tokens)
    mode = "add" if combine == "add" else "multiply"
    for k in {1, min(tokens, 40), tokens}:
        picks = coverage_reference(features, [0, tokens], [k], weights, mode, limit_bytes=limit)
        assert picks.tolist() == oracle(exact_cosines(features), k, weights, mode)


def test_reference_without_ties_on_a_long_segment() -> None:
    centres = torch.randn(30, 64)
    features = centres[torch.randint(0, 30, (1500,))] + 0.7 * torch.randn(1500, 64)
    weights = torch.rand(1500) ** 2
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    expected = oracle(unit @ unit.T, 30, weights)
    assert coverage(features, [0, 1500], [30], weights=weights).tolist() == expected


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("combine", ["multiply", "add"])
def test_every_token_is_chosen_once(combine: str, implementation: str, device: str) -> None:
    features = torch.randn(34, 24)
    features[5] = features[9] = features[0]
    features[7], features[8] = 0.0, torch.nan
    weights = torch.rand(34)
    weights[3] = 0.0
    weights[11], weights[30] = torch.nan, torch.inf
    options = {"weights": weights.to(device), "combine": combine, "implementation": implementation}
    picks = coverage(features.to(device), [0, 34], [34], **options).tolist()
    assert sorted(picks) == list(range(34))
    assert picks[-3:] == [8, 11, 30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combine", ["none", "multiply", "add"])
def test_kernel_on_ragged_segments(combine: str, dtype: torch.dtype, device: str) -> None:
    features = tied_features(90, 40).to(dtype)
    features[:, 16:] = 0.0
    features[40], features[41], features[50] = 0.0, torch.inf, features[52]
    weights = None if combine == "none" else quarters(90).to(dtype)
    options = {"combine": "add" if combine == "add" else "multiply"}
    offsets, k = [0, 0, 1, 8, 40, 90], [0, 1, 7, 3, 6]
    expected = coverage(features, offsets, k, weights=weights, **options)
    weights = None if weights is None else weights.to(device)
    picks = coverage(features.to(device), offsets, k, weights=weights, implementation="triton", **options)
    assert torch.equal(picks.cpu(), expected)


def test_segments_that_break_the_limit_go_through_the_reference(device: str) -> None:
    features, weights = tied_features(80).to(device), quarters(80).to(device)
    arguments = (features, [0, 30, 80], [4, 6], weights, "multiply")
    picks = coverage_triton(*arguments, limit_bytes=5000)
    assert torch.equal(picks, coverage_reference(*arguments))


@pytest.mark.usefixtures("large_shapes")
def test_kernel_on_many_long_segments(device: str) -> None:
    features = tied_features(40 * 576 + 2880, 64).half().to(device)
    offsets = [*range(0, 41 * 576, 576), 40 * 576 + 2880]
    arguments = (features, offsets, [64] * 40 + [320])
    weights = quarters(offsets[-1]).to(device)
    found, expected = (coverage(*arguments, weights=weights, implementation=name) for name in ("triton", "torch"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_given_values(implementation: str, device: str) -> None:
    values = torch.randint(-2, 5, (30, 1100)).float()
    values[20] = values[4]
    excluded = torch.zeros(30, dtype=torch.bool)
    excluded[:2] = True
    values[7, 3] = torch.nan
    usable = values.clone()
    usable[excluded], usable[7] = -1.0, -1.0
    options = {"excluded": excluded.to(device), "implementation": implementation}
    picks = coverage_from_values(values.to(device).to(torch.bfloat16), 30, **options).tolist()
    assert picks[:12] == oracle(usable, 12)
    assert sorted(picks) == list(range(30))
    assert picks[-3:] == [0, 1, 7]
    strided = values.to(device).T.contiguous().T
    assert coverage_from_values(strided, 4, **options).tolist() == picks[:4]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_nothing_left_to_cover(implementation: str, device: str) -> None:
    values = torch.ones(40, 5, device=device)
    assert coverage_from_values(values, 20, implementation=implementation).tolist() == list(range(20))
    values = torch.zeros(6, 0, device=device)
    assert coverage_from_values(values, 3, implementation=implementation).tolist() == [0, 1, 2]
    assert coverage_from_values(values, 0, implementation=implementation).shape == (0,)
    assert coverage(torch.zeros(3, 2, device=device), [0, 3], [0], implementation=implementation).shape == (0,)
    weights = torch.tensor([1.0, 3.0, 2.0, 3.0], device=device)
    picks = coverage_from_values(
        torch.zeros(4, 2, device=device), 4, weights=weights, combine="add", implementation=implementation
    )
    assert picks.tolist() == [1, 3, 2, 0]


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3))
@settings(max_examples=6, deadline=None)
def test_both_ways_on_any_shape(device: str, seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    k = [min(6, int(torch.randint(0, length + 1, (1,), generator=generator))) for length in lengths]
    features = torch.randint(0, 2, (offsets[-1], 16), generator=generator).mul(2).sub(1).float()
    expected = [
        pick
        for (begin, end), count in zip(pairwise(offsets), k, strict=True)
        for pick in oracle(exact_cosines(features[begin:end]), count)
    ]
    for name in ("torch", "triton"):
        assert coverage(features.to(device), offsets, k, implementation=name).tolist() == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coverage(torch.zeros(4), [0, 4], [1]), "two-dimensional"),
        (lambda: coverage(torch.zeros(4, 2), [0, 4], [5]), r"k\[0\] = 5"),
        (lambda: coverage(torch.zeros(4, 2), [0, 4], [1], weights=torch.ones(3)), r"weights must be \[4\]"),
        (lambda: coverage(torch.zeros(4, 2), [0, 4], [1], combine="max"), "'max' is not one of multiply, add"),
        (lambda: coverage_from_values(torch.zeros(4), 1), "two-dimensional"),
        (lambda: coverage_from_values(torch.zeros(4, 2), 5), r"k\[0\] = 5"),
        (lambda: coverage_from_values(torch.zeros(4, 2), 1, excluded=torch.zeros(4)), r"excluded must be bool \[4\]"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
