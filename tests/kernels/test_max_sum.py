"""Greedy max-sum diversification."""

import pytest
import torch

from support.greedy_oracle import exact_cosines, greedy_oracle, tied_features
from vlmprune.kernels.max_sum import max_sum, max_sum_reference, max_sum_triton
from vlmprune.kernels.shared.cosine_matrix import MATRIX_LIMIT_BYTES

LIMITS = pytest.mark.parametrize("limit", [0, MATRIX_LIMIT_BYTES], ids=["from-features", "from-matrix"])


@LIMITS
@pytest.mark.parametrize("tokens", [1, 7, 63, 577])
def test_reference_is_exact_on_ties(tokens: int, limit: int) -> None:
    features = tied_features(tokens)
    for k in {1, min(tokens, 60), tokens}:
        picks = max_sum_reference(features, [0, tokens], [k], [tokens // 2], limit_bytes=limit)
        assert picks.tolist() == greedy_oracle(exact_cosines(features), k, tokens // 2, total=True)


@pytest.mark.parametrize("tokens", [2880, 10000])
def test_reference_on_long_segments(tokens: int) -> None:
    features = torch.randn(tokens, 32)
    unit = torch.nn.functional.normalize(features, dim=1)
    assert max_sum(features, [0, tokens], [12], [5]).tolist() == greedy_oracle(unit @ unit.T, 12, 5, total=True)


@pytest.mark.parametrize("tokens", [63, 577])
def test_every_token_is_chosen_once(tokens: int) -> None:
    features = torch.randn(tokens, 24)
    features[5] = features[9] = features[0]
    features[7], features[8] = 0.0, torch.nan
    picks = max_sum(features, [0, tokens], [tokens], [2])
    assert sorted(picks.tolist()) == list(range(tokens))
    assert picks[-1] == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_on_ragged_segments(dtype: torch.dtype, device: str) -> None:
    features = tied_features(170, 40).to(dtype)
    # The norm of 40 ones is not exact: only rows with a power of two under the root are tied the same way everywhere.
    features[:, 16:] = 0.0
    features[40], features[41], features[50] = 0.0, torch.inf, features[52]
    arguments = [0, 0, 1, 8, 40, 170], [0, 1, 3, 3, 5], [0, 0, 3, 31, 10]
    picks = max_sum(features.to(device), *arguments, implementation="triton")
    assert torch.equal(picks.cpu(), max_sum(features, *arguments))


def test_kernel_without_a_matrix(device: str) -> None:
    features = tied_features(80, 16).half()
    features[40], features[41], features[50] = 0.0, torch.nan, features[52]
    arguments = ([0, 30, 80], [2, 5], [3, 10])
    # The first segment's matrix fits, the second's does not.
    picks = max_sum_triton(features.to(device), *arguments, limit_bytes=5000)
    assert torch.equal(picks.cpu(), max_sum_reference(features, *arguments))


@pytest.mark.usefixtures("large_shapes")
@LIMITS
@pytest.mark.parametrize("tokens", [577, 2880, 10000])
def test_kernel_on_long_segments(tokens: int, limit: int, device: str) -> None:
    features = tied_features(2 * tokens, 64).half().to(device)
    arguments = ([0, tokens, 2 * tokens], [tokens // 4, 17], [5, 0])
    expected = max_sum_reference(features, *arguments)
    assert torch.equal(max_sum_triton(features, *arguments, limit_bytes=limit), expected)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_no_picks(implementation: str, device: str) -> None:
    assert max_sum(torch.zeros(3, 2, device=device), [0, 3], [0], [0], implementation=implementation).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), [0, 4], [1], [0]), "two-dimensional"),
        ((torch.zeros(4, 2), [0, 4], [5], [0]), r"k\[0\] = 5"),
        ((torch.zeros(4, 2), [0, 4], [1], [-1]), r"seeds\[0\] = -1"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_sum(*arguments)
