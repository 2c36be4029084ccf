"""Farthest-point choice, with and without weights."""

import resource
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.greedy_oracle import exact_cosines, greedy_oracle, tied_features
from vlmprune.kernels.max_min import max_min, max_min_reference, max_min_triton
from vlmprune.kernels.shared.cosine_matrix import MATRIX_LIMIT_BYTES

LIMITS = pytest.mark.parametrize("limit", [0, MATRIX_LIMIT_BYTES], ids=["from-features", "from-matrix"])


def halves(tokens: int) -> torch.Tensor:
    """Weights whose products with exact distances are exact, many of them 0 and tied."""
    return torch.randint(0, 5, (tokens,)) / 2.0


@LIMITS
@pytest.mark.parametrize("tokens", [1, 7, 63, 577])
def test_reference_is_exact_on_ties(tokens: int, limit: int) -> None:
    features, weights = tied_features(tokens), halves(tokens)
    cosines = exact_cosines(features)
    for k in {1, min(tokens, 60), tokens}:
        for seed in (None, tokens // 2):
            for weight in (None, weights):
                seeds = None if seed is None else [seed]
                picks = max_min_reference(features, [0, tokens], [k], seeds, weight, limit_bytes=limit)
                expected = greedy_oracle(cosines, k, seed, weights=None if weight is None else weight.double())
                assert picks.tolist() == expected


@pytest.mark.parametrize("tokens", [2880, 10000])
def test_reference_on_long_segments(tokens: int) -> None:
    features = torch.randn(tokens, 32)
    unit = torch.nn.functional.normalize(features, dim=1)
    weights = torch.rand(tokens)
    cosines = unit @ unit.T
    assert max_min(features, [0, tokens], [12]).tolist() == greedy_oracle(cosines, 12)
    picks = max_min(features, [0, tokens], [12], weights=weights)
    assert picks.tolist() == greedy_oracle(cosines, 12, weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", [0.5, 1.0, 5.0])
def test_without_a_matrix_clusters_are_picked_as_one_by_one(weighted: bool, spread: float) -> None:
    """Few picks of a pool count where they rule each other out, many where tokens are all alike or all apart."""
    generator = torch.Generator().manual_seed(int(10 * spread))
    centres = torch.randn(40, 24, generator=generator).repeat_interleave(20, 0)
    features = centres + spread * torch.randn(800, 24, generator=generator)
    weights = torch.rand(800, generator=generator) if weighted else None
    picks = max_min_reference(features, [0, 800], [500], None, weights, limit_bytes=0)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    assert picks.tolist() == greedy_oracle(unit @ unit.T, 500, weights=None if weights is None else weights.double())


def test_the_first_pick_of_a_long_segment_is_found_among_repeats() -> None:
    """All but three tokens have an equal one; of these the farthest from its nearest neighbour counts."""
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randn(1500, 32, generator=generator).repeat(2, 1)
    alone = torch.randn(3, 32, generator=generator)
    features = torch.cat([pairs[:1000], alone, pairs[1000:]])
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    nearest = (unit[1000:1003] @ unit.T).scatter(1, torch.arange(1000, 1003)[:, None], -2).amax(1)
    (pick,) = max_min_reference(features, [0, 3003], [1], None, limit_bytes=0).tolist()
    assert pick == 1000 + int(nearest.argmin())
    assert max_min_reference(pairs, [0, 3000], [1], None, limit_bytes=0).tolist() == [0]


@LIMITS
@pytest.mark.parametrize("greedy", [max_min_reference, max_min_triton])
def test_where_every_token_has_an_equal_one_rounding_does_not_choose(greedy, limit: int, device: str) -> None:
    if greedy is max_min_reference:
        device = "cpu"
    features = torch.randn(20, 100, device=device).repeat_interleave(2, 0)
    for scale in torch.rand(4):
        picks = greedy(features * float(scale), [0, 40], [30], None, limit_bytes=limit).tolist()
        assert picks[0] == 0
        assert {pick // 2 for pick in picks[:20]} == set(range(20))
        assert all(pick % 2 == 0 for pick in picks[:20])
        # Nothing is left but equals of what is chosen.
        assert picks[20:] == list(range(1, 20, 2))


@pytest.mark.parametrize("tokens", [63, 577])
def test_every_token_is_chosen_once(tokens: int) -> None:
    features = torch.randn(tokens, 24)
    features[5] = features[9] = features[0]
    features[7], features[8] = 0.0, torch.nan
    picks = max_min(features, [0, tokens], [tokens])
    assert sorted(picks.tolist()) == list(range(tokens))
    assert picks[-1] == 8


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_weights_of_any_kind(implementation: str, device: str) -> None:
    features = torch.randn(70, 24).to(device)
    features[7], features[8] = 0.0, torch.nan
    weights = torch.rand(140, dtype=torch.float64, device=device)[::2]
    weights[3] = weights[20] = 0.0
    weights[11], weights[30], weights[31] = torch.nan, torch.inf, -torch.inf
    picks = max_min(features, [0, 70], [70], weights=weights, implementation=implementation).tolist()
    assert sorted(picks) == list(range(70))
    assert picks[-6:] == [3, 20, 8, 11, 30, 31]
    assert picks[0] == int(weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_on_ragged_segments(weighted: bool, seeded: bool, dtype: torch.dtype, device: str) -> None:
    features = tied_features(170, 40).to(dtype)
    # The norm of 40 ones is not exact: only rows with a power of two under the root are tied the same way everywhere.
    features[:, 16:] = 0.0
    features[40], features[41], features[50] = 0.0, torch.inf, features[52]
    offsets, k = [0, 0, 1, 8, 40, 170], [0, 1, 3, 3, 5]
    seeds = [0, 0, 3, 31, 10] if seeded else None
    weights = halves(170).to(dtype) if weighted else None
    expected = max_min(features, offsets, k, seeds=seeds, weights=weights)
    if weights is not None:
        weights = weights.to(device)
    picks = max_min(features.to(device), offsets, k, seeds=seeds, weights=weights, implementation="triton")
    assert torch.equal(picks.cpu(), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_without_a_matrix(weighted: bool, device: str) -> None:
    features = tied_features(80, 16).half()
    features[40], features[41], features[50] = 0.0, torch.nan, features[52]
    weights = halves(80) if weighted else None
    if weights is not None:
        weights[60] = torch.nan
    arguments = ([0, 30, 80], [2, 5], None)
    expected = max_min_reference(features, *arguments, weights)
    # The first segment's matrix fits, the second's does not.
    moved = None if weights is None else weights.to(device)
    picks = max_min_triton(features.to(device), *arguments, moved, limit_bytes=5000)
    assert torch.equal(picks.cpu(), expected)


def test_kernel_takes_strided_features(device: str) -> None:
    features = torch.randn(24, 130).to(device).T[:, 4:20]
    picks = max_min(features, [0, 130], [5], implementation="triton")
    assert torch.equal(picks, max_min(features, [0, 130], [5], implementation="torch"))


@pytest.mark.usefixtures("large_shapes")
@LIMITS
@pytest.mark.parametrize("tokens", [577, 2880, 10000])
def test_kernel_on_long_segments(tokens: int, limit: int, device: str) -> None:
    features = tied_features(2 * tokens, 64).half().to(device)
    arguments = ([0, tokens, 2 * tokens], [tokens // 4, 17], None)
    for weights in (None, halves(2 * tokens).to(device)):
        expected = max_min_reference(features, *arguments, weights)
        assert torch.equal(max_min_triton(features, *arguments, weights, limit_bytes=limit), expected)


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
    picks = max_min_reference(features, [0, 8192], [3], None, limit_bytes=0)
    assert torch.equal(picks, max_min(features, [0, 8192], [3]))
    assert MATRIX_LIMIT_BYTES < 10**9
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


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3), weighted=st.booleans())
@settings(max_examples=6, deadline=None)
def test_kernel_on_any_shape(device: str, seed: int, lengths: list[int], weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    k = [min(6, int(torch.randint(0, length + 1, (1,), generator=generator))) for length in lengths]
    features = torch.randint(0, 2, (offsets[-1], 16), generator=generator).mul(2).sub(1).float().to(device)
    weights = torch.randint(0, 4, (offsets[-1],), generator=generator).to(device) if weighted else None
    picks = max_min(features, offsets, k, weights=weights, implementation="triton")
    assert torch.equal(picks, max_min(features, offsets, k, weights=weights, implementation="torch"))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_no_picks(implementation: str, device: str) -> None:
    features = torch.zeros(3, 2, device=device)
    assert max_min(features, [0, 3], [0], implementation=implementation).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": torch.zeros(4)}, "two-dimensional"),
        ({"metric": "l2"}, "'l2' is not 'cosine'"),
        ({"k": [5]}, r"k\[0\] = 5"),
        ({"seeds": [4]}, r"seeds\[0\] = 4 is not in 0..3"),
        ({"seeds": [0, 0]}, "2 for 1 segments"),
        ({"weights": torch.ones(3)}, r"weights must be \[4\]"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_min(**{"features": torch.zeros(4, 2), "offsets": [0, 4], "k": [1], **options})
