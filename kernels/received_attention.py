"""Attention that each token receives: column means of softmax(q k^T) without the square matrix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.attention_columns import AttentionColumns, attention_bounds
from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation
from vlmprune.kernels.shared.segments import check_offsets

HEAD_REDUCTIONS = ("mean", "none", "sum")
QUERY_REDUCTIONS = ("mean", "sum")

# Upper size of the block of the attention matrix that the reference holds at a time.
BLOCK_BYTES = 64 * 2**20


def received_attention(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    reduce_heads: str = "mean",
    reduce_queries: str = "mean",
    max_seqlen: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return how much attention every token receives from the queries of its sequence: fp32 `[tokens]`.

    Args:
        query: `[tokens, heads, head_dim]`, packed sequences, rotary positions already applied, any strides.
        key: `[tokens, kv_heads, head_dim]`; `heads` must be a multiple of `kv_heads` (grouped queries).
        cu_seqlens: `[sequences + 1]` bounds; attention windows are just shorter sequences.
        scale: factor of the logits; None for `head_dim ** -0.5`.
        causal: a query sees keys up to itself. The mean still divides by all queries of the sequence.
        reduce_heads: "mean" or "sum" over heads, or "none": `[tokens, heads]`.
        reduce_queries: "mean" or "sum" over the queries of the sequence.
        max_seqlen: the longest sequence, so that a `cu_seqlens` on the GPU needs no host sync; it is then not checked.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, bound or reduction.
        KernelUnavailableError: the forced implementation cannot run.
    """
    _check(query, key, reduce_heads, reduce_queries)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if choose_implementation(query.device, implementation) == "triton":
        return _received_attention_triton(
            query, key, cu_seqlens, scale, causal, reduce_heads, reduce_queries == "mean", max_seqlen
        )
    bounds = check_offsets(cu_seqlens, query.shape[0], "cu_seqlens")
    received = received_attention_reference(query, key, bounds, scale, causal, reduce_queries)
    if reduce_heads == "none":
        return received
    return received.mean(1) if reduce_heads == "mean" else received.sum(1)


def received_attention_reference(
    query: Tensor, key: Tensor, bounds: Sequence[int], scale: float, causal: bool, reduce_queries: str
) -> Tensor:
    """Attention received per head, fp32 `[tokens, heads]`, for arguments that are already checked."""
    heads = query.shape[1]
    received = torch.empty(query.shape[0], heads, dtype=torch.float32, device=query.device)
    for begin, length, windows in _equal_runs(bounds, max(1, BLOCK_BYTES // 4 // max(heads, 1))):
        end = begin + length * windows
        # [windows, heads, length, head_dim]
        queries = query[begin:end].to(torch.float32).mul(scale).view(windows, length, heads, -1).transpose(1, 2)
        keys = key[begin:end].to(torch.float32).view(windows, length, key.shape[1], -1).transpose(1, 2)
        keys = keys.repeat_interleave(heads // key.shape[1], dim=1).transpose(2, 3).contiguous()
        total = torch.zeros(windows, heads, length, dtype=torch.float32, device=query.device)
        rows = max(1, BLOCK_BYTES // (4 * windows * heads * length))
        for first in range(0, length, rows):
            scores = queries[:, :, first : first + rows] @ keys
            if causal:
                positions = torch.arange(length, device=query.device)
                scores.masked_fill_(positions > positions[first : first + rows, None], -torch.inf)
            total += scores.softmax(-1).sum(2)
        if reduce_queries == "mean":
            total /= length
        received[begin:end] = total.transpose(1, 2).reshape(length * windows, heads)
    return received


def _received_attention_triton(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    scale: float,
    causal: bool,
    reduce_heads: str,
    mean_queries: bool,
    max_seqlen: int | None,
) -> Tensor:
    tokens, heads, _ = query.shape
    bounds, longest = attention_bounds(cu_seqlens, max_seqlen, query)
    # Heads are added up afterwards, in order: with atomics the sum would depend on which program came first.
    shape = (tokens, heads) if reduce_heads == "none" else (heads, tokens)
    received = torch.empty(shape, dtype=torch.float32, device=query.device)
    if tokens and heads and longest:
        columns = AttentionColumns(query, key, bounds, longest, scale, causal)
        columns.sums(received, (heads, 1) if reduce_heads == "none" else (1, tokens), mean=mean_queries)
    if reduce_heads == "none":
        return received
    return received.mean(0) if reduce_heads == "mean" else received.sum(0)


def _equal_runs(bounds: Sequence[int], most_scores: int) -> list[tuple[int, int, int]]:
    """Join neighbouring sequences of equal length: (first token, length, number of sequences), empty ones left out."""
    runs: list[tuple[int, int, int]] = []
    for begin, end in pairwise(bounds):
        length = end - begin
        if length == 0:
            continue
        if runs and runs[-1][1] == length and (runs[-1][2] + 1) * length**2 <= most_scores:
            runs[-1] = (runs[-1][0], length, runs[-1][2] + 1)
        else:
            runs.append((begin, length, 1))
    return runs


def _check(query: Tensor, key: Tensor, reduce_heads: str, reduce_queries: str) -> None:
    if reduce_heads not in HEAD_REDUCTIONS:
        raise ValueError(f"reduce_heads={reduce_heads!r} is not one of {', '.join(HEAD_REDUCTIONS)}.")
    if reduce_queries not in QUERY_REDUCTIONS:
        raise ValueError(f"reduce_queries={reduce_queries!r} is not one of {', '.join(QUERY_REDUCTIONS)}.")
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(
            "query must be [tokens, heads, head_dim] and key [tokens, kv_heads, head_dim]; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2] or query.shape[1] % max(key.shape[1], 1):
        raise ValueError(
            "query and key must agree in tokens and head_dim, and heads must be a multiple of kv_heads; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype} {head_dim}{' causal' if causal else ''}", _received_attention_triton,
        (Like(dtype, (2880, 16, head_dim)), Like(dtype, (2880, 16, head_dim)), [0, 2880], 0.1, causal, heads, True, None),
    )
    for dtype, head_dim, causal, heads in (
        (torch.bfloat16, 64, False, "mean"), (torch.bfloat16, 128, True, "none"), (torch.float32, 80, False, "mean"),
        (torch.float32, 128, False, "mean"),
    )
)  # fmt: skip
