"""Greedy MAP of a determinantal point process."""

import pytest
import torch
from torch import Tensor

from vlmprune.kernels.dpp_map import dpp_map, dpp_map_reference, dpp_map_triton

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def oracle(features: Tensor, k: int, weights: Tensor | None = None) -> list[int]:
    """The definition, in float64: what each token adds to the determinant, given all chosen ones."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    rows = unit if weights is None else unit * weights.double()[:, None]
    matrix, picks = rows @ rows.T, []
    while len(picks) < k:
        gain = matrix.diagonal().clone()
        if picks:
            gain -= (matrix[picks] * torch.linalg.solve(matrix[picks][:, picks], matrix[picks])).sum(0)
        # At first all gains are 1 up to rounding.
        gain = gain.round(decimals=12)
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
    return picks


@pytest.mark.parametrize("limit", [0, 10**9], ids=["from-features", "from-matrix"])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (7, 7), (63, 20), (577, 60)])
def test_reference_is_the_definition(tokens: int, k: int, limit: int) -> None:
    features, weights = torch.randn(tokens, 96), torch.rand(tokens) + 0.1
    for weight in (None, weights):
        picks = dpp_map_reference(features, [0, tokens], [k], weight, limit_bytes=limit).tolist()
        assert picks == oracle(features, k, weight)


@BOTH
def test_the_rank_runs_out(implementation: str, device: str) -> None:
    which = torch.tensor([3, 0, 3, 1, 2, 0, 1, 4, 4, 2, 3])
    features = torch.eye(5)[which].to(device)
    picks = dpp_map(features, [0, 11], [11], implementation=implementation)
    assert picks.tolist() == [0, 1, 3, 4, 7, 2, 5, 6, 8, 9, 10]
    # The heaviest of each direction, the heaviest first.
    weights = torch.tensor([1.0, 1.0, 2.0, 4.0, 0.5, 1.0, 4.0, 0.0, 0.0, 3.0, 1.0], device=device)
    picks = dpp_map(features, [0, 11], [11], weights=weights, implementation=implementation)
    assert picks.tolist() == [3, 9, 2, 1, 0, 4, 5, 6, 7, 8, 10]


def test_rounding_of_a_low_rank_repeats_nothing() -> None:
    features = torch.randn(200, 16) @ torch.randn(16, 64)
    picks = dpp_map(features, [0, 200], [100])
    assert len(set(picks.tolist())) == 100
    assert picks[:16].tolist() == oracle(features, 16)
    assert picks[16:].tolist() == sorted(picks[16:].tolist())


@BOTH
def test_broken_rows_come_last(implementation: str, device: str) -> None:
    features = torch.randn(40, 48).to(device)
    features[5] = features[9] = features[1]
    features[7], features[8] = 0.0, torch.nan
    weights = torch.rand(80, device=device)[::2]
    weights[3], weights[11], weights[30] = 0.0, torch.nan, torch.inf
    picks = dpp_map(features, [0, 40], [40], weights=weights, implementation=implementation).tolist()
    assert sorted(picks) == list(range(40))
    assert picks[-3:] == [8, 11, 30]
    twins = sorted((1, 5, 9), key=lambda token: -float(weights[token]))[1:]
    assert sorted(picks[-7:-3]) == sorted([3, 7, *twins])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_on_ragged_segments(weighted: bool, dtype: torch.dtype, device: str) -> None:
    features = torch.randn(120, 40).to(dtype)
    features[90], features[91], features[92] = 0.0, torch.inf, features[93]
    offsets, k = [0, 0, 1, 8, 50, 120], [0, 1, 7, 12, 9]
    weights = torch.rand(120).to(dtype) if weighted else None
    expected = dpp_map(features, offsets, k, weights=weights)
    weights = None if weights is None else weights.to(device)
    assert torch.equal(
        dpp_map(features.to(device), offsets, k, weights=weights, implementation="triton").cpu(), expected
    )


def test_segments_that_break_the_limit_go_through_the_reference(device: str) -> None:
    features, weights = torch.randn(80, 16).to(device), torch.rand(80, device=device)
    arguments = (features, [0, 30, 80], [4, 6], weights)
    assert torch.equal(dpp_map_triton(*arguments, limit_bytes=5000), dpp_map_reference(*arguments))


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_on_long_segments(dtype: torch.dtype, device: str) -> None:
    features = torch.randn(40 * 144 + 2880, 1024).to(dtype).to(device)
    offsets = [*range(0, 41 * 144, 144), 40 * 144 + 2880]
    weights = torch.rand(offsets[-1], device=device)
    arguments = (features, offsets, [16] * 40 + [320])
    found, expected = (dpp_map(*arguments, weights=weights, implementation=name) for name in ("triton", "torch"))
    assert (found == expected).float().mean() > 0.99


@BOTH
def test_no_picks(implementation: str, device: str) -> None:
    assert dpp_map(torch.zeros(3, 2, device=device), [0, 3], [0], implementation=implementation).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": torch.zeros(4)}, "two-dimensional"),
        ({"k": [5]}, r"k\[0\] = 5"),
        ({"weights": torch.ones(3)}, r"weights must be \[4\]"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpp_map(**{"features": torch.zeros(4, 2), "offsets": [0, 4], "k": [1], **options})
