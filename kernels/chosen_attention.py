"""Attention that chosen queries of one sequence pay to chosen keys: text rows over an image's tokens, say."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.kernels.row_attention import row_attention
from vlmprune.kernels.shared.compile_cases import CompileCase

HEAD_REDUCTIONS = ("mean", "none")
QUERY_REDUCTIONS = ("none", "mean", "sum")

# Upper size of the block of rows, all heads and keys, that is held at a time; on a processor what stays in its cache.
BLOCK_BYTES, CACHED_BYTES = 64 * 2**20, 2**20


def chosen_attention(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    *,
    last: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    reduce_heads: str = "mean",
    reduce_queries: str = "none",
    implementation: str | None = None,
) -> Tensor:
    """Return `softmax(scale * query key^T)[:, columns]`, the softmax over all keys that a query sees, fp32.

    Only blocks of the asked rows are ever held. Shapes: `[queries, columns]`, `[queries, heads, columns]` without a reduction
    over heads; without the leading `queries` where these are reduced.

    Args:
        query: `[queries, heads, head_dim]`, any strides.
        key: `[keys, kv_heads, head_dim]`; `heads` must be a multiple of `kv_heads` (grouped queries).
        columns: int64 `[columns]`, the keys whose attention is wanted, in any order.
        last: int64 `[queries]`, the last key that each query sees (causal attention); None for all keys.
        valid: bool `[keys]`, False at padding; None if there is none.
        scale: factor of the logits; None for `head_dim ** -0.5`.
        reduce_heads: "mean" over heads, or "none".
        reduce_queries: "none", or the "mean" or "sum" over queries (0 where there are none).
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape or reduction.
        KernelUnavailableError: the forced implementation cannot run.
    """
    _check(query, key, columns, last, valid, reduce_heads, reduce_queries)
    queries, heads = query.shape[:2]
    keys = key.shape[0]
    on_cpu = query.device.type == "cpu"
    block = max(1, (CACHED_BYTES if on_cpu else BLOCK_BYTES) // max(1, 4 * heads * keys))
    places = torch.arange(keys, device=key.device)
    by_head = () if reduce_heads == "mean" else (heads,)
    total = torch.zeros(*by_head, keys, dtype=torch.float32, device=query.device)
    parts = []
    for begin in range(0, queries, block):
        rows = slice(begin, begin + block)
        # Keys that no row of the block sees are left out where asking for the last one waits for nothing.
        ends = keys if last is None or not on_cpu else min(keys, max(1, int(last[rows].max()) + 1))
        seen = None if last is None else places[:ends] <= last[rows, None]
        if valid is not None:
            seen = valid[None, :ends].expand(len(query[rows]), -1) if seen is None else seen & valid[:ends]
        found = row_attention(
            query[None, rows],
            key[None, :ends],
            scale=scale,
            mask=None if seen is None else seen[None].contiguous(),
            reduce=reduce_heads,
            implementation=implementation,
        )[0]
        if reduce_queries == "none":
            parts.append(pad(found, (0, keys - ends)).index_select(-1, columns))
        else:
            total[..., :ends] += found.sum(0)
    if reduce_queries == "none":
        return torch.cat(parts) if parts else total.new_zeros(0, *by_head, columns.numel())
    total = total.index_select(-1, columns)
    return total / max(1, queries) if reduce_queries == "mean" else total


def _check(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    last: Tensor | None,
    valid: Tensor | None,
    reduce_heads: str,
    reduce_queries: str,
) -> None:
    if reduce_heads not in HEAD_REDUCTIONS:
        raise ValueError(f"reduce_heads={reduce_heads!r} is not one of {', '.join(HEAD_REDUCTIONS)}.")
    if reduce_queries not in QUERY_REDUCTIONS:
        raise ValueError(f"reduce_queries={reduce_queries!r} is not one of {', '.join(QUERY_REDUCTIONS)}.")
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(
            "query must be [queries, heads, head_dim] and key [keys, kv_heads, head_dim]; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if columns.dim() != 1 or columns.dtype != torch.int64:
        raise ValueError(f"columns must be int64 [columns]; got {columns.dtype} {tuple(columns.shape)}.")
    if last is not None and (last.dtype != torch.int64 or last.shape != query.shape[:1]):
        raise ValueError(f"last must be int64 [{query.shape[0]}]; got {last.dtype} {tuple(last.shape)}.")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != key.shape[:1]):
        raise ValueError(f"valid must be bool [{key.shape[0]}]; got {valid.dtype} {tuple(valid.shape)}.")


# Only the kernels of `row_attention`.
COMPILE_CASES: tuple[CompileCase, ...] = ()
