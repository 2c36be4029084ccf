"""Farthest-point choice from a distance matrix."""

import pytest
import torch

from support.greedy_oracle import greedy_oracle
from vlmprune.kernels.max_min_from_distances import max_min_from_distances


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("seed", [None, 4])
def test_given_distances(seed: int | None, implementation: str, device: str) -> None:
    distances = torch.randint(0, 9, (70, 70)).float()
    distances = distances + distances.T
    expected = greedy_oracle(-distances, 12, seed)
    picks = max_min_from_distances(distances.to(device), 12, seed=seed, implementation=implementation)
    assert picks.tolist() == expected
    distances[3] = distances[:, 3] = torch.nan
    picks = max_min_from_distances(distances[:9, :9].to(device), 9, seed=seed, implementation=implementation)
    assert sorted(picks.tolist()) == list(range(9))
    assert picks[-1] == 3


def test_no_picks() -> None:
    assert max_min_from_distances(torch.zeros(0, 0), 0).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "k", "message"), [((4, 3), 1, "square"), ((4,), 1, "square"), ((4, 4), 5, r"k\[0\] = 5")]
)
def test_bad_arguments(shape: tuple[int, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_min_from_distances(torch.zeros(shape), k)
