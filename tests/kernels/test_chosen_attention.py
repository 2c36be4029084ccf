"""Attention of chosen queries to chosen keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels import chosen_attention as module
from vlmprune.kernels.chosen_attention import chosen_attention

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])


def oracle(query, key, columns, last=None, valid=None, reduce_heads="mean", reduce_queries="none"):
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    rows = []
    for number, row in enumerate(query.double()):
        seen = torch.ones(len(key), dtype=torch.bool) if valid is None else valid.clone()
        if last is not None:
            seen[last[number] + 1 :] = False
        scores = torch.einsum("hd,khd->hk", row, keys) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)[:, columns]
        rows.append(weights.mean(0) if reduce_heads == "mean" else weights)
    found = torch.stack(rows)
    return found if reduce_queries == "none" else getattr(found, reduce_queries)(0)


@BOTH
@pytest.mark.parametrize("reduce_heads", ["mean", "none"])
@pytest.mark.parametrize("reduce_queries", ["none", "mean", "sum"])
def test_blocks_of_rows_give_the_whole(implementation, reduce_heads, reduce_queries, device, monkeypatch):
    query, key = torch.randn(9, 6, 16), torch.randn(23, 2, 16)
    columns, last = torch.tensor([7, 3, 22, 0]), torch.tensor([22, 5, 9, 11, 12, 13, 14, 3, 8])
    valid = torch.arange(23) > 1
    reduce = {"reduce_heads": reduce_heads, "reduce_queries": reduce_queries}
    expected = oracle(query, key, columns, last, valid, **reduce)
    query, key, columns, last, valid = (given.to(device) for given in (query, key, columns, last, valid))
    more = {"last": last, "valid": valid, "implementation": implementation, **reduce}
    for size in (module.BLOCK_BYTES, 4 * 6 * 23 * 4):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
        monkeypatch.setattr(module, "CACHED_BYTES", size)
        found = chosen_attention(query, key, columns, **more)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), expected, atol=1e-6, rtol=1e-5)


@given(seed=st.integers(0, 10**6), queries=st.integers(1, 7), keys=st.integers(1, 40), masked=st.booleans())
@settings(max_examples=10, deadline=None)
def test_both_ways_on_any_shape(device, seed, queries, keys, masked):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(queries, 4, 8, generator=generator), torch.randn(keys, 2, 8, generator=generator)
    columns = torch.randperm(keys, generator=generator)[: 1 + keys // 2]
    last = torch.randint(0, keys, (queries,), generator=generator) if masked else None
    expected = oracle(query, key, columns, last)
    for name in ("torch", "triton"):
        sent = None if last is None else last.to(device)
        found = chosen_attention(query.to(device), key.to(device), columns.to(device), last=sent, implementation=name)
        torch.testing.assert_close(found.cpu().double(), expected, atol=1e-6, rtol=1e-5)


def test_nothing_asked():
    query, key, columns = torch.randn(0, 4, 8), torch.randn(5, 4, 8), torch.arange(3)
    assert chosen_attention(query, key, columns).shape == (0, 3)
    assert chosen_attention(query, key, columns, reduce_heads="none").shape == (0, 4, 3)
    assert chosen_attention(query, key, columns, reduce_queries="mean").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce_heads": "max"}, "reduce_heads='max'"),
        ({"reduce_queries": "max"}, "reduce_queries='max'"),
        ({"columns": torch.zeros(2)}, "columns must be int64"),
        ({"last": torch.zeros(3, dtype=torch.int64)}, r"last must be int64 \[2\]"),
        ({"valid": torch.zeros(4, dtype=torch.bool)}, r"valid must be bool \[5\]"),
        ({"query": torch.zeros(2, 4)}, "query must be"),
    ],
)
def test_bad_arguments(change, message):
    given = {"query": torch.zeros(2, 4, 8), "key": torch.zeros(5, 4, 8), "columns": torch.arange(2), **change}
    with pytest.raises(ValueError, match=message):
        chosen_attention(given.pop("query"), given.pop("key"), given.pop("columns"), **given)
