"""Attention received by packed tokens."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmprune.kernels import received_attention as module
from vlmprune.kernels.received_attention import received_attention


def oracle(query: Tensor, key: Tensor, bounds: list[int], causal: bool = False) -> Tensor:
    """Sum over queries, per head, float64 `[tokens, heads]`."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    received = torch.zeros(query.shape[:2], dtype=torch.float64)
    for begin, end in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], key[begin:end]) * query.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        received[begin:end] = scores.softmax(-1).sum(1).T
    return received


def inputs(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    query = torch.randn(heads, tokens, dim).to(dtype).transpose(0, 1)
    key = torch.randn(tokens, kv_heads, 2 * dim).to(dtype)[..., dim:]
    return [query, key]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 63, 577, 2880])
def test_reference(tokens: int, causal: bool) -> None:
    query, key = inputs(tokens, 2, 1, 8)
    found = received_attention(query, key, [0, tokens], causal=causal, reduce_heads="none", reduce_queries="sum")
    torch.testing.assert_close(found.double(), oracle(query, key, [0, tokens], causal), atol=1e-4, rtol=1e-4)


def test_reference_on_10000_tokens_in_blocks() -> None:
    query, key = inputs(10000, 1, 1, 8)
    found = received_attention(query, key, [0, 10000], reduce_queries="sum")
    assert abs(float(found.sum()) - 10000) < 1
    scores = (query[:, 0] @ key[:50, 0].T) * 8**-0.5
    log_sums = torch.cat([(query[i : i + 500, 0] @ key[:, 0].T * 8**-0.5).logsumexp(1) for i in range(0, 10000, 500)])
    expected = (scores - log_sums[:, None]).exp().sum(0)
    torch.testing.assert_close(found[:50], expected, atol=1e-3, rtol=1e-3)


def test_reference_joins_windows_and_splits_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [0, 16, 32, 48, 64, 64, 70, 101]
    query, key = inputs(101, 4, 2, 8)
    for block in (1, 4 * 4 * 16 * 16 * 3, module.BLOCK_BYTES):
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
        for causal in (False, True):
            found = received_attention(query, key, bounds, causal=causal, reduce_heads="sum", reduce_queries="sum")
            expected = oracle(query, key, bounds, causal).sum(1)
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", ["mean", "none", "sum"])
@pytest.mark.parametrize("queries", ["mean", "sum"])
def test_kernel_modes(queries: str, heads: str, causal: bool, device: str) -> None:
    bounds = [0, 7, 7, 8, 93]
    query, key = inputs(93, 2, 1, 20)
    options = {"causal": causal, "reduce_heads": heads, "reduce_queries": queries}
    found = received_attention(query.to(device), key.to(device), bounds, implementation="triton", **options)
    torch.testing.assert_close(found.cpu(), received_attention(query, key, bounds, **options), atol=1e-5, rtol=1e-4)
    expected = oracle(query, key, bounds, causal)
    if queries == "mean":
        lengths = torch.tensor([7] * 7 + [1] + [85] * 85, dtype=torch.float64)
        expected = expected / lengths[:, None]
    expected = expected if heads == "none" else expected.sum(1) / (2 if heads == "mean" else 1)
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
def test_kernel_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    query, key = inputs(130, 1, 1, 16)
    query, key = query.to(dtypes[0]).to(device), key.to(dtypes[1]).to(device)
    found = received_attention(query, key, [0, 130], scale=0.4, implementation="triton")
    expected = received_attention(query, key, [0, 130], scale=0.4, implementation="torch")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_kernel_with_bounds_on_the_device(device: str) -> None:
    query, key = (tensor.to(device) for tensor in inputs(40, 1, 1, 16))
    bounds = torch.tensor([0, 16, 40], dtype=torch.int32, device=device)
    expected = received_attention(query, key, [0, 16, 40], implementation="torch")
    for longest in (24, None):
        found = received_attention(query, key, bounds, max_seqlen=longest, implementation="triton")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("large_shapes")
@pytest.mark.parametrize("tokens", [577, 2880, 10000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_on_long_sequences(dtype: torch.dtype, causal: bool, tokens: int, device: str) -> None:
    query, key = (tensor.to(device) for tensor in inputs(tokens + 64, 8, 2, 80, dtype))
    bounds = [0, tokens, tokens + 64]
    found = received_attention(query, key, bounds, causal=causal, reduce_queries="sum", implementation="triton")
    expected = received_attention(query, key, bounds, causal=causal, reduce_queries="sum", implementation="torch")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_broken_neighbour_does_not_spread(implementation: str, device: str) -> None:
    query, key = (tensor.to(device) for tensor in inputs(40, 2, 1, 8))
    before = received_attention(query, key, [0, 20, 40], implementation=implementation)
    query[3] = torch.nan
    after = received_attention(query, key, [0, 20, 40], implementation=implementation)
    assert torch.equal(before[20:], after[20:])
    assert after[:20].isnan().all()


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_every_query_gives_one(lengths: list[int]) -> None:
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    query, key = inputs(bounds[-1], 2, 2, 4)
    received = received_attention(query, key, bounds, reduce_queries="sum")
    for begin, end in pairwise(bounds):
        assert abs(float(received[begin:end].sum()) - (end - begin)) < 1e-4


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 3, 8), (4, 2, 8)), {}, "multiple of kv_heads"),
        (((4, 2, 8), (5, 2, 8)), {}, "agree in tokens"),
        (((4, 8), (4, 2, 8)), {}, "query must be"),
        (((4, 2, 8), (4, 2, 8)), {"reduce_heads": "max"}, "'max' is not one of mean, none, sum"),
        (((4, 2, 8), (4, 2, 8)), {"reduce_queries": "none"}, "'none' is not one of mean, sum"),
        (((5, 2, 8), (5, 2, 8)), {}, "cu_seqlens must begin with 0"),
    ],
)
def test_bad_arguments(shapes: tuple[tuple[int, ...], ...], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        received_attention(torch.zeros(shapes[0]), torch.zeros(shapes[1]), [0, 4], **options)  # type: ignore[arg-type]
