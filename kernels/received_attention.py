"""Attention that each token receives: column means of softmax(q k^T) without the square matrix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, dot_needs_fp32, tl, triton
from vlmprune.kernels.shared.segments import check_offsets, on_device

HEAD_REDUCTIONS = ("mean", "none", "sum")
QUERY_REDUCTIONS = ("mean", "sum")

# Upper size of the block of the attention matrix that the reference holds at a time.
BLOCK_BYTES = 64 * 2**20

LOG2_E = 1.4426950408889634


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
    device = query.device
    tokens, heads, head_dim = query.shape
    if isinstance(cu_seqlens, Tensor) and max_seqlen is not None:
        bounds, longest = cu_seqlens.to(device), max_seqlen
    else:
        host = check_offsets(cu_seqlens, tokens, "cu_seqlens")
        bounds, longest = on_device(host, device), max((end - begin for begin, end in pairwise(host)), default=0)
    # Heads are added up afterwards, in order: with atomics the sum would depend on which program came first.
    shape = (tokens, heads) if reduce_heads == "none" else (heads, tokens)
    received = torch.empty(shape, dtype=torch.float32, device=device)
    stride_t, stride_h = (heads, 1) if reduce_heads == "none" else (1, tokens)
    if tokens and heads and longest:
        log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=device)
        # Products without tensor cores hold their operands in registers: smaller tiles, more warps, or they spill.
        scalar = dot_needs_fp32(query, key) or query.dtype == torch.float32
        wide, narrow = 64 if longest <= 64 or scalar else 128, 32 if scalar else 64
        blocks = triton.cdiv(longest, wide)
        grid = (blocks * (bounds.numel() - 1), heads)
        shared = (query, *query.stride(), key, *key.stride(), bounds, log_sums)
        options = {
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "CAUSAL": causal,
            "UPCAST": dot_needs_fp32(query, key),
            "num_warps": 4 if wide == 64 and not scalar else 8,
            "num_stages": 2 if scalar else 3,
        }
        log2_scale = scale * LOG2_E
        sizes = (log2_scale, tokens, heads // key.shape[1], head_dim, blocks)
        _log_sum_kernel[grid](*shared, *sizes, BLOCK_Q=wide, BLOCK_K=narrow, **options)
        _column_kernel[grid](
            *(*shared, received, stride_t, stride_h, *sizes), BLOCK_K=wide, BLOCK_Q=narrow, MEAN=mean_queries, **options
        )
    if reduce_heads == "none":
        return received
    return received.mean(0) if reduce_heads == "mean" else received.sum(0)


@triton.jit
def _log_sum_kernel(
    query,
    stride_qt,
    stride_qh,
    stride_qd,
    key,
    stride_kt,
    stride_kh,
    stride_kd,
    bounds,
    log_sums,
    log2_scale,
    TOTAL,
    G,
    D,
    N,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Base-2 logarithm of each query's softmax denominator, as in the forward pass of flash attention."""
    i_s = tl.program_id(0) // N
    i_q = tl.program_id(0) % N * BLOCK_Q
    i_h = tl.program_id(1).to(tl.int64)
    i_begin = tl.load(bounds + i_s).to(tl.int64)
    T = (tl.load(bounds + i_s + 1) - i_begin).to(tl.int32)
    if i_q < T:
        o_q = i_q + tl.arange(0, BLOCK_Q)
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_q = query + i_begin * stride_qt + i_h * stride_qh + o_q.to(tl.int64)[:, None] * stride_qt
        p_k = key + i_begin * stride_kt + (i_h // G) * stride_kh
        b_q = tl.load(p_q + o_d[None, :] * stride_qd, mask=(o_q < T)[:, None] & m_d[None, :], other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_peak = tl.full([BLOCK_Q], -float("inf"), dtype=tl.float32)
        b_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
        end = tl.minimum(T, i_q + BLOCK_Q) if CAUSAL else T
        for i_k in range(0, end, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            p_block = p_k + o_k.to(tl.int64)[:, None] * stride_kt + o_d[None, :] * stride_kd
            b_k = tl.load(p_block, mask=(o_k < T)[:, None] & m_d[None, :], other=0.0)
            if UPCAST:
                b_k = b_k.to(tl.float32)
            b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * log2_scale  # [BLOCK_Q, BLOCK_K]
            m_seen = (o_k < T)[None, :]
            if CAUSAL:
                m_seen = m_seen & (o_k[None, :] <= o_q[:, None])
            b_score = tl.where(m_seen, b_score, -float("inf"))
            b_new = tl.maximum(b_peak, tl.max(b_score, 1))
            # No key yet: any finite number does, and it keeps -inf minus -inf out.
            b_zero = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp2(b_peak - b_zero) + tl.sum(tl.exp2(b_score - b_zero[:, None]), 1)
            b_peak = b_new
        tl.store(log_sums + i_h * TOTAL + i_begin + o_q, b_peak + tl.log2(b_sum), mask=o_q < T)


@triton.jit
def _column_kernel(
    query,
    stride_qt,
    stride_qh,
    stride_qd,
    key,
    stride_kt,
    stride_kh,
    stride_kd,
    bounds,
    log_sums,
    received,
    stride_t,
    stride_h,
    log2_scale,
    TOTAL,
    G,
    D,
    N,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Column sums of one block of keys over all queries; keys lie along the rows of the tile, so a sum stays in a warp."""
    i_s = tl.program_id(0) // N
    i_k = tl.program_id(0) % N * BLOCK_K
    i_h = tl.program_id(1).to(tl.int64)
    i_begin = tl.load(bounds + i_s).to(tl.int64)
    T = (tl.load(bounds + i_s + 1) - i_begin).to(tl.int32)
    if i_k < T:
        o_k = i_k + tl.arange(0, BLOCK_K)
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < D
        p_k = key + i_begin * stride_kt + (i_h // G) * stride_kh + o_k.to(tl.int64)[:, None] * stride_kt
        p_q = query + i_begin * stride_qt + i_h * stride_qh
        p_log = log_sums + i_h * TOTAL + i_begin
        b_k = tl.load(p_k + o_d[None, :] * stride_kd, mask=(o_k < T)[:, None] & m_d[None, :], other=0.0)
        if UPCAST:
            b_k = b_k.to(tl.float32)
        b_sum = tl.zeros([BLOCK_K], dtype=tl.float32)
        first = i_k // BLOCK_Q * BLOCK_Q if CAUSAL else 0
        for i_q in range(first, T, BLOCK_Q):
            o_q = i_q + tl.arange(0, BLOCK_Q)
            p_block = p_q + o_q.to(tl.int64)[:, None] * stride_qt + o_d[None, :] * stride_qd
            b_q = tl.load(p_block, mask=(o_q < T)[:, None] & m_d[None, :], other=0.0)
            if UPCAST:
                b_q = b_q.to(tl.float32)
            # Queries past the end have an infinite denominator and so add nothing.
            b_log = tl.load(p_log + o_q, mask=o_q < T, other=float("inf"))
            b_score = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * log2_scale  # [BLOCK_K, BLOCK_Q]
            b_share = tl.exp2(b_score - b_log[None, :])
            if CAUSAL:
                b_share = tl.where(o_k[:, None] <= o_q[None, :], b_share, 0.0)
            b_sum += tl.sum(b_share, 1)
        if MEAN:
            b_sum = b_sum / T
        tl.store(received + (i_begin + o_k) * stride_t + i_h * stride_h, b_sum, mask=o_k < T)


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
