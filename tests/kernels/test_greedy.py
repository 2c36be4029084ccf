"""Greedy choice of diverse tokens: max_min, max_min_from_distances and max_sum."""

import resource
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.kernels import greedy
from vlmprune.kernels.max_min import max_min, max_min_from_distances
from vlmprune.kernels.max_sum import max_sum


def oracle(similarity: Tensor, k: int, seed: int | None = None, total: bool = False) -> list[int]:
    """The sheet's loop: look at all chosen rows again at every step, never at a chosen token."""
    tokens = similarity.shape[0]
    if seed is None:
        seed = int(similarity.masked_fill(torch.eye(tokens, dtype=torch.bool), -torch.inf).amax(1).argmin())
    picks = [seed]
    while len(picks) < k:
        rows = similarity[picks]
        score = rows.sum(0) if total else rows.amax(0)
        score[picks] = torch.inf
        picks.append(int(score.argmin()))
    return picks[:k]


def tied_features(tokens: int, dim: int = 16) -> Tensor:
    """Rows of ones and minus ones: norms and cosines are exact in fp16, and most distances are tied."""
    return torch.randint(0, 2, (tokens, dim)) * 2.0 - 1.0


def exact_cosines(features: Tensor) -> Tensor:
    features = features.double()
    return features @ features.T / features.shape[1]


@pytest.mark.parametrize("limit", [0, greedy.GRAM_LIMIT_BYTES], ids=["from-features", "from-matrix"])
@pytest.mark.parametrize("tokens", [1, 7, 63, 577])
def test_reference_is_exact_on_ties(tokens: int, limit: int) -> None:
    features = tied_features(tokens)
    cosines = exact_cosines(features)
    for k in {1, min(tokens, 60), min(tokens, 577)}:
        seed = tokens // 2
        for seeds, total in ((None, False), ([seed], False), ([seed], True)):
            picks = greedy.features_reference(features, [0, tokens], [k], seeds, total=total, gram_limit_bytes=limit)
            assert picks.tolist() == oracle(cosines, k, seeds and seed, total)


@pytest.mark.parametrize("tokens", [2880, 10000])
def test_reference_on_long_segments(tokens: int) -> None:
    features = torch.randn(tokens, 32)
    unit = torch.nn.functional.normalize(features, dim=1)
    picks = max_min(features, [0, tokens], [12]).tolist()
    cosines = unit @ unit.T
    assert picks == oracle(cosines, 12)
    assert max_sum(features, [0, tokens], [12], [5]).tolist() == oracle(cosines, 12, 5, True)


@pytest.mark.parametrize("tokens", [63, 577])
def test_every_token_is_chosen_once(tokens: int) -> None:
    features = torch.randn(tokens, 24)
    features[5] = features[9] = features[0]
    features[7], features[8] = 0.0, torch.nan
    for picks in (max_min(features, [0, tokens], [tokens]), max_sum(features, [0, tokens], [tokens], [2])):
        assert sorted(picks.tolist()) == list(range(tokens))
        assert picks[-1] == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seeded", [False, True])
def test_kernel_on_ragged_segments(seeded: bool, dtype: torch.dtype, device: str) -> None:
    features = tied_features(170, 40).to(dtype)
    # The norm of 40 ones is not exact: only rows with a power of two under the root are tied the same way everywhere.
    features[:, 16:] = 0.0
    features[40], features[41], features[50] = 0.0, torch.inf, features[52]
    offsets, k = [0, 0, 1, 8, 40, 170], [0, 1, 3, 3, 5]
    seeds = [0, 0, 3, 31, 10] if seeded else None
    moved = features.to(device)
    expected = max_min(features, offsets, k, seeds=seeds)
    assert torch.equal(max_min(moved, offsets, k, seeds=seeds, implementation="triton").cpu(), expected)
    if seeds:
        expected = max_sum(features, offsets, k, seeds)
        assert torch.equal(max_sum(moved, offsets, k, seeds, implementation="triton").cpu(), expected)


@pytest.mark.parametrize("total", [False, True])
def test_kernel_without_a_matrix(total: bool, device: str) -> None:
    features = tied_features(80, 16).half()
    features[40], features[41], features[50] = 0.0, torch.nan, features[52]
    seeds = [3, 10] if total else None
    arguments = ([0, 30, 80], [2, 5], seeds)
    expected = greedy.features_reference(features, *arguments, total=total)
    # The first segment's matrix fits, the second's does not.
    picks = greedy.features_triton(features.to(device), *arguments, total=total, gram_limit_bytes=5000)
    assert torch.equal(picks.cpu(), expected)


def test_kernel_takes_strided_features(device: str) -> None:
    features = torch.randn(24, 130).to(device).T[:, 4:20]
    picks = max_min(features, [0, 130], [5], implementation="triton")
    assert torch.equal(picks, max_min(features, [0, 130], [5], implementation="torch"))


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("limit", [0, greedy.GRAM_LIMIT_BYTES], ids=["from-features", "from-matrix"])
@pytest.mark.parametrize("tokens", [577, 2880, 10000])
@pytest.mark.parametrize("total", [False, True])
def test_kernel_on_long_segments(total: bool, tokens: int, limit: int, device: str) -> None:
    features = tied_features(2 * tokens, 64).half().to(device)
    arguments = ([0, tokens, 2 * tokens], [tokens // 4, 17], [5, 0] if total else None)
    expected = greedy.features_reference(features, *arguments, total=total)
    assert torch.equal(greedy.features_triton(features, *arguments, total=total, gram_limit_bytes=limit), expected)


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_on_features_without_ties(dtype: torch.dtype, device: str) -> None:
    features = torch.randn(2880, 256).to(dtype).to(device)
    expected = max_min(features.double().float(), [0, 2880], [64], implementation="torch")
    assert torch.equal(max_min(features, [0, 2880], [64], implementation="triton"), expected)


def test_32k_tokens_need_less_than_a_gigabyte() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    picks = max_min(torch.randn(32768, 64).half(), [0, 32768], [9], seeds=[4])
    assert len(set(picks.tolist())) == 9
    # The seed rule holds blocks of rows of the matrix: with 8k tokens a quarter of what it needs with 32k.
    features = torch.randn(8192, 8).half()
    picks = greedy.features_reference(features, [0, 8192], [3], None, total=False, gram_limit_bytes=0)
    assert torch.equal(picks, max_min(features, [0, 8192], [3]))
    assert greedy.GRAM_LIMIT_BYTES < 10**9
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 10**9


@pytest.mark.gpu
@pytest.mark.usefixtures("large_shapes")
def test_kernel_on_32k_tokens_needs_less_than_a_gigabyte(device: str) -> None:
    features = torch.randn(32768, 4096, dtype=torch.bfloat16, device=device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    picks = max_min(features, [0, 32768], [64])
    assert torch.cuda.max_memory_allocated() - before < 10**9
    assert len(set(picks.tolist())) == 64


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_segments_do_not_see_each_other(seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    k = [int(torch.randint(0, length + 1, (1,), generator=generator)) for length in lengths]
    features = torch.randint(-1, 2, (offsets[-1], 6), generator=generator).float()
    together = max_min(features, offsets, k)
    alone = [
        max_min(features[begin:end], [0, end - begin], [count])
        for (begin, end), count in zip(pairwise(offsets), k, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3))
@settings(max_examples=4, deadline=None)
def test_kernel_on_any_shape(device: str, seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    k = [min(6, int(torch.randint(0, length + 1, (1,), generator=generator))) for length in lengths]
    features = torch.randint(0, 2, (offsets[-1], 16), generator=generator).mul(2).sub(1).float().to(device)
    picks = max_min(features, offsets, k, implementation="triton")
    assert torch.equal(picks, max_min(features, offsets, k, implementation="torch"))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("seed", [None, 4])
def test_given_distances(seed: int | None, implementation: str, device: str) -> None:
    distances = torch.randint(0, 9, (70, 70)).float()
    distances = distances + distances.T
    expected = oracle(-distances, 12, seed)
    picks = max_min_from_distances(distances.to(device), 12, seed=seed, implementation=implementation)
    assert picks.tolist() == expected
    distances[3] = distances[:, 3] = torch.nan
    picks = max_min_from_distances(distances[:9, :9].to(device), 9, seed=seed, implementation=implementation)
    assert sorted(picks.tolist()) == list(range(9))
    assert picks[-1] == 3


def test_no_picks() -> None:
    assert max_min_from_distances(torch.zeros(0, 0), 0).shape == (0,)
    assert max_min(torch.zeros(3, 2), [0, 3], [0]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: max_min(torch.zeros(4), [0, 4], [1]), "two-dimensional"),
        (lambda: max_min(torch.zeros(4, 2), [0, 4], [1], metric="l2"), "'l2' is not 'cosine'"),
        (lambda: max_min(torch.zeros(4, 2), [0, 4], [5]), r"k\[0\] = 5"),
        (lambda: max_min(torch.zeros(4, 2), [0, 4], [1], seeds=[4]), r"seeds\[0\] = 4 is not in 0..3"),
        (lambda: max_min(torch.zeros(4, 2), [0, 4], [1], seeds=[0, 0]), "2 for 1 segments"),
        (lambda: max_sum(torch.zeros(4), [0, 4], [1], [0]), "two-dimensional"),
        (lambda: max_sum(torch.zeros(4, 2), [0, 4], [1], [-1]), r"seeds\[0\] = -1"),
        (lambda: max_min_from_distances(torch.zeros(4, 3), 1), "square"),
        (lambda: max_min_from_distances(torch.zeros(4, 4), 5), r"k\[0\] = 5"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
