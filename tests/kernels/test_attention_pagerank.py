"""PageRank on attention."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from support.peak_memory import PeakMemory
from vlmprune.kernels import attention_pagerank as module
from vlmprune.kernels.attention_pagerank import attention_pagerank

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def oracle(
    query: Tensor, key: Tensor, bounds: list[int], iterations: int, scale: float, causal: bool, seen: Tensor | None,
    start: Tensor | None,
) -> Tensor:  # fmt: skip
    """The definition, in float64, one query at a time."""
    tokens, heads, _ = query.shape
    votes = torch.zeros(tokens, heads, dtype=torch.float64)
    for begin, end in pairwise(bounds):
        length = end - begin
        for head in range(heads):
            keys = key[begin:end, head // (heads // key.shape[1])].double()
            matrix = torch.zeros(length, length, dtype=torch.float64)
            for row in range(length):
                visible = torch.ones(length, dtype=torch.bool) if seen is None else seen[begin:end].clone()
                if causal:
                    visible[row + 1 :] = False
                if visible.any():
                    scores = (keys[visible] @ query[begin + row, head].double()) * scale
                    matrix[row, visible] = scores.softmax(0)
            current = torch.ones(length).double() if start is None else start[begin:end].double()
            current = current / current.sum()
            for _ in range(iterations):
                current = current @ matrix
            votes[begin:end, head] = current
    return votes


@BOTH
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restricted", [False, True])
def test_ragged_sequences(restricted: bool, dtype: torch.dtype, causal: bool, implementation: str, device: str) -> None:
    query, key = torch.randn(85, 4, 40).to(dtype)[..., ::2] * 2, torch.randn(85, 2, 20).to(dtype)
    bounds = [0, 1, 1, 15, 85]
    seen = torch.rand(85) < 0.5 if restricted else None
    start = torch.rand(85) if restricted else None
    if seen is not None:
        # No query of the first sequence sees anything, and no early one of the next either where it is causal.
        seen[:4] = False
    moved = [None if x is None else x.to(device) for x in (seen, start)]
    found = attention_pagerank(
        *(query.to(device), key.to(device), bounds, 3), scale=0.3, causal=causal, seen=moved[0], start=moved[1],
        reduce_heads="none", implementation=implementation,
    )  # fmt: skip
    expected = oracle(query, key, bounds, 3, 0.3, causal, seen, start)
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-6, rtol=1e-4)
    assert found.dtype == torch.float32


@BOTH
def test_reductions(implementation: str, device: str) -> None:
    query, key = torch.randn(20, 4, 16, device=device), torch.randn(20, 4, 16, device=device)
    by_head = oracle(query.cpu(), key.cpu(), [0, 20], 5, 0.25, False, None, None)
    for name, expected in (("rms", by_head.square().mean(1).sqrt()), ("mean", by_head.mean(1))):
        found = attention_pagerank(query, key, [0, 20], 5, reduce_heads=name, implementation=implementation)
        torch.testing.assert_close(found.cpu().double(), expected, atol=1e-6, rtol=1e-4)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("size", [1, 4 * 30 * 7, 4 * 900])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_in_blocks(causal: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.randn(47, 4, 8), torch.randn(47, 2, 8), [0, 17, 47], 3)
    seen = torch.rand(47) < 0.7
    whole = attention_pagerank(*arguments, causal=causal, seen=seen)
    monkeypatch.setattr(module, "BLOCK_BYTES", size)
    torch.testing.assert_close(attention_pagerank(*arguments, causal=causal, seen=seen), whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_never_holds_the_attention_of_all_heads(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the dispatcher: no tensor beyond a block, and never as much alive at once as all heads' rows are."""
    heads, length = 16, 600
    query, key = torch.randn(length, heads, 16), torch.randn(length, 4, 16)
    seen = torch.arange(length) >= 3
    expected = oracle(query, key, [0, length], 2, 0.25, causal, seen, None)
    every = 4 * heads * length**2
    # Whole heads in the cache, and rows of one head made again in each round.
    for block, cached in ((module.BLOCK_BYTES, module.CACHED_BYTES), (4 * length * 50, 1)):
        monkeypatch.setattr(module, "BLOCK_BYTES", block)
        monkeypatch.setattr(module, "CACHED_BYTES", cached)
        with PeakMemory() as memory:
            votes = attention_pagerank(
                query, key, [0, length], 2, causal=causal, seen=seen, reduce_heads="none", implementation="torch"
            )
        torch.testing.assert_close(votes.double(), expected, atol=1e-6, rtol=1e-4)
        limit = min(block, max(cached, 4 * length**2))
        assert memory.largest <= max(limit, 4 * query.numel())
        assert memory.peak < every // 2


def test_the_counter_sees_the_attention_of_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_BYTES", module.BLOCK_BYTES)
    query, key = torch.randn(600, 16, 16), torch.randn(600, 4, 16)
    with PeakMemory() as memory:
        attention_pagerank(query, key, [0, 600], 2, implementation="torch")
    assert memory.largest == 4 * 16 * 600**2


@BOTH
def test_bounds_on_the_device(implementation: str, device: str) -> None:
    query, key = torch.randn(30, 2, 16, device=device), torch.randn(30, 2, 16, device=device)
    expected = attention_pagerank(query, key, [0, 10, 30], 2, implementation="torch")
    bounds = torch.tensor([0, 10, 30], device=device)
    found = attention_pagerank(query, key, bounds, 2, max_seqlen=20, implementation=implementation)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert attention_pagerank(query[:0], key[:0], [0, 0], 2, implementation=implementation).shape == (0,)


BASE = {"query": torch.zeros(4, 2, 8), "key": torch.zeros(4, 2, 8), "cu_seqlens": [0, 4], "iterations": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(4, 8)}, "query must be"),
        ({"key": torch.zeros(4, 3, 8)}, "multiple of kv_heads"),
        ({"cu_seqlens": [0, 3]}, "cu_seqlens must"),
        ({"iterations": 0}, "iterations=0"),
        ({"reduce_heads": "max"}, "'max' is not one of rms, mean, none"),
        ({"seen": torch.ones(4)}, r"seen must be bool \[4\]"),
        ({"start": torch.ones(3)}, r"start must be \[4\]"),
    ],
)
def test_bad_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_pagerank(**{**BASE, **changes})
