"""Best partner of every source."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.greedy_oracle import tied_features
from vlmprune.kernels import bipartite_match as module
from vlmprune.kernels.bipartite_match import bipartite_match


def oracle(sources: Tensor, destinations: Tensor, bounds: list[int], ends: list[int]) -> tuple[Tensor, Tensor]:
    partners, scores = [], []
    for (begin, end), (first, last) in zip(pairwise(bounds), pairwise(ends), strict=True):
        for source in sources[begin:end].double():
            best, where = -torch.inf, 0
            for i, destination in enumerate(destinations[first:last].double()):
                if source.isfinite().all() and destination.isfinite().all():
                    norms = source.norm() * destination.norm()
                    cosine = float(source @ destination / norms) if norms > 0 else 0.0
                    if cosine > best:
                        best, where = cosine, i
            partners.append(where)
            scores.append(best)
    return torch.tensor(partners, dtype=torch.int64), torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ragged_segments_with_ties_and_broken_rows(dtype: torch.dtype, implementation: str, device: str) -> None:
    sources, destinations = tied_features(90).to(dtype), tied_features(150).to(dtype)
    sources[3], sources[40], destinations[70] = 0.0, torch.nan, torch.inf
    destinations[0] = torch.nan
    bounds, ends = [0, 1, 1, 20, 85, 90], [0, 1, 3, 10, 150, 150]
    partners, scores = bipartite_match(
        sources.to(device), destinations.to(device), bounds, ends, implementation=implementation
    )
    expected, expected_scores = oracle(sources, destinations, bounds, ends)
    assert torch.equal(partners.cpu(), expected)
    torch.testing.assert_close(scores.cpu().double(), expected_scores, atol=1e-6, rtol=0)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_strided_halves_as_tome_splits_them(implementation: str, device: str) -> None:
    metric = torch.randn(41, 20, device=device).T[:, :33]
    partners, scores = bipartite_match(metric[::2], metric[1::2], [0, 10], [0, 10], implementation=implementation)
    unit = torch.nn.functional.normalize(metric.double(), dim=1)
    best = (unit[::2] @ unit[1::2].T).max(1)
    assert torch.equal(partners, best.indices)
    torch.testing.assert_close(scores.double(), best.values, atol=1e-6, rtol=0)


def test_more_destinations_than_one_program_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPAN", 64)
    sources, destinations = tied_features(70).to(device), tied_features(333).to(device)
    arguments = (sources, destinations, [0, 5, 70], [0, 10, 333])
    found, expected = (bipartite_match(*arguments, implementation=name) for name in ("triton", "torch"))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, destinations = torch.randn(577, 16), torch.randn(130, 16)
    whole = bipartite_match(sources, destinations, [0, 577], [0, 130])
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1000)
    parts = bipartite_match(sources, destinations, [0, 577], [0, 130])
    assert torch.equal(parts[0], whole[0])


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_on_many_tokens(dtype: torch.dtype, device: str) -> None:
    features = torch.randn(23040, 128).to(dtype).to(device)
    arguments = (features[::2], features[1::2], [0, 1440, 11520], [0, 1440, 11520])
    found, expected = (bipartite_match(*arguments, implementation=name) for name in ("triton", "torch"))
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    assert (found[0] == expected[0]).float().mean() > 0.999


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4))
@settings(max_examples=20, deadline=None)
def test_both_ways_on_any_shape(device: str, seed: int, lengths: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    bounds, ends = ([sum(pair[i] for pair in lengths[:n]) for n in range(len(lengths) + 1)] for i in (0, 1))
    sources = torch.randint(-1, 2, (bounds[-1], 4), generator=generator).float()
    destinations = torch.randint(-1, 2, (ends[-1], 4), generator=generator).float()
    expected = oracle(sources, destinations, bounds, ends)
    for name in ("torch", "triton"):
        partners, scores = bipartite_match(
            sources.to(device), destinations.to(device), bounds, ends, implementation=name
        )
        torch.testing.assert_close(scores.cpu().double(), expected[1], atol=1e-6, rtol=0)
        # Cosines of unlike norms are tied only in exact arithmetic: any of the best partners will do.
        assert partners.shape == expected[0].shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 2), torch.zeros(4, 3), [0, 4], [0, 4]), "same dim"),
        ((torch.zeros(4), torch.zeros(4, 3), [0, 4], [0, 4]), "same dim"),
        ((torch.zeros(4, 2), torch.zeros(4, 2), [0, 3], [0, 4]), "source_offsets must"),
        ((torch.zeros(4, 2), torch.zeros(4, 2), [0, 4], [0, 4, 3]), "destination_offsets must"),
        ((torch.zeros(4, 2), torch.zeros(4, 2), [0, 4], [0, 2, 4]), "same number of segments; got 1 and 2"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bipartite_match(*arguments)
