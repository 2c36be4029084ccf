"""Top-k with a quota a window."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.kernels.windowed_topk import windowed_topk

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def oracle(scores: Tensor, windows: Tensor, quotas: list[int]) -> list[int]:
    values, kept = scores.float().tolist(), []
    for window, quota in enumerate(quotas):
        tokens = [token for token in range(len(values)) if windows[token] == window]
        numbers = sorted((t for t in tokens if not math.isnan(values[t])), key=lambda t: (-values[t], t))
        kept += (numbers + [t for t in tokens if math.isnan(values[t])])[:quota]
    return sorted(kept) + [-1] * (sum(quotas) - len(kept))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_a_grid(dtype: torch.dtype, implementation: str, device: str) -> None:
    rows, columns = torch.arange(24)[:, None] // 6, torch.arange(24)[None, :] // 6
    windows = (rows * 4 + columns).flatten()
    scores = torch.randn(576, 2).mul(4).round().to(dtype)[:, 1]
    scores[5], scores[100] = torch.nan, torch.inf
    quotas = [0, 1, 36, 40, *range(12)]
    picks = windowed_topk(scores.to(device), windows.to(device), quotas, implementation=implementation)
    assert picks.tolist() == oracle(scores, windows, quotas)
    assert picks[-4:].tolist() == [-1] * 4


@BOTH
def test_tokens_in_no_window_and_empty_windows(implementation: str, device: str) -> None:
    scores, windows = torch.randn(50), torch.randint(-1, 3, (50,))
    windows[windows == 1] = -1
    quotas = [3, 2, 4]
    picks = windowed_topk(scores.to(device), windows.to(device), quotas, implementation=implementation)
    assert picks.tolist() == oracle(scores, windows, quotas)
    counts = torch.tensor(quotas, device=device)
    again = windowed_topk(scores.to(device), windows.to(device), counts, total=9, implementation=implementation)
    assert torch.equal(again, picks)


@BOTH
def test_nothing_to_choose(implementation: str, device: str) -> None:
    scores, windows = torch.randn(5, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    assert windowed_topk(scores, windows, [0], implementation=implementation).shape == (0,)
    assert windowed_topk(scores, windows - 1, [], implementation=implementation).shape == (0,)
    assert windowed_topk(scores, windows - 1, [2], implementation=implementation).tolist() == [-1, -1]


@given(
    seed=st.integers(0, 10**6), quotas=st.lists(st.integers(0, 6), min_size=1, max_size=5), tokens=st.integers(1, 40)
)
@settings(max_examples=12, deadline=None)
def test_both_ways_on_any_shape(device: str, seed: int, quotas: list[int], tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (tokens,), generator=generator).float()
    windows = torch.randint(-1, len(quotas), (tokens,), generator=generator)
    for name in ("torch", "triton"):
        picks = windowed_topk(scores.to(device), windows.to(device), quotas, implementation=name)
        assert picks.tolist() == oracle(scores, windows, quotas)


@pytest.mark.parametrize(
    ("scores", "windows", "quotas", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(4, dtype=torch.int64), [1], "one-dimensional"),
        (torch.zeros(4), torch.zeros(3, dtype=torch.int64), [1], r"windows must be int64 \[4\]"),
        (torch.zeros(4), torch.zeros(4), [1], r"windows must be int64 \[4\]"),
        (torch.zeros(4), torch.full((4,), 1), [1], r"-1\.\.0; got 1\.\.1"),
        (torch.zeros(4), torch.full((4,), -2), [1], r"-1\.\.0; got -2\.\.-2"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), [-1], "negative"),
    ],
)
def test_bad_arguments(scores: Tensor, windows: Tensor, quotas: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windowed_topk(scores, windows, quotas)
