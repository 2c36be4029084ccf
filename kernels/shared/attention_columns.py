"""Column sums of attention matrices that are never made, for `received_attention` and `attention_pagerank`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.implementation import dot_needs_fp32, tl, triton
from vlmprune.kernels.shared.segments import check_offsets, on_device

LOG2_E = 1.4426950408889634


def attention_bounds(cu_seqlens: Sequence[int] | Tensor, max_seqlen: int | None, query: Tensor) -> tuple[Tensor, int]:
    """Return the bounds on the device of `query` and the longest sequence; no sync where `max_seqlen` is given."""
    if isinstance(cu_seqlens, Tensor) and max_seqlen is not None:
        return cu_seqlens.to(query.device), max_seqlen
    host = check_offsets(cu_seqlens, query.shape[0], "cu_seqlens")
    return on_device(host, query.device), max((end - begin for begin, end in pairwise(host)), default=0)


class AttentionColumns:
    """Column sums of softmax(q k^T) without the matrix: the rows' denominators once, then any number of sums.

    Args:
        query: `[tokens, heads, head_dim]`, packed sequences, any strides.
        key: `[tokens, kv_heads, head_dim]`.
        bounds: int64 `[sequences + 1]` on the device.
        longest: of the sequences, 1 or more.
        scale: factor of the logits.
        causal: a query sees keys up to itself.
        seen: bool `[tokens]`, keys that can be seen; None for all. A query that sees none gives 0 to all.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bounds: Tensor,
        longest: int,
        scale: float,
        causal: bool,
        seen: Tensor | None = None,
    ) -> None:
        tokens, heads, head_dim = query.shape
        self.tokens, self.heads = tokens, heads
        self._log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
        # Products without tensor cores hold their operands in registers: smaller tiles, more warps, or they spill.
        scalar = dot_needs_fp32(query, key) or query.dtype == torch.float32
        self._wide, self._narrow = (32, 32) if scalar else (64 if longest <= 64 else 128, 64)
        blocks = triton.cdiv(longest, self._wide)
        self._grid = (blocks * (bounds.numel() - 1), heads)
        hidden = bounds if seen is None else seen.contiguous().view(torch.uint8)
        self._shared = (query, *query.stride(), key, *key.stride(), bounds, hidden, self._log_sums)
        self._sizes = (scale * LOG2_E, tokens, heads // key.shape[1], head_dim, blocks)
        self._options = {
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "CAUSAL": causal,
            "MASKED": seen is not None,
            "UPCAST": dot_needs_fp32(query, key),
            "num_warps": 4 if self._wide == 64 and not scalar else 8,
            "num_stages": 2 if scalar else 3,
        }
        _log_sum_kernel[self._grid](
            *self._shared, *self._sizes, BLOCK_Q=self._wide, BLOCK_K=self._narrow, **self._options
        )

    def sums(
        self, received: Tensor, strides: tuple[int, int], *, votes: Tensor | None = None, mean: bool = False
    ) -> None:
        """Write how much attention each token receives by head.

        Args:
            received: fp32, tokens and heads as far apart as `strides` says.
            strides: of the tokens and of the heads.
            votes: fp32 `[heads, tokens]`, what each query's attention counts; None for 1 each.
            mean: divide by the number of queries.
        """
        _column_kernel[self._grid](
            *(*self._shared, received if votes is None else votes, received, *strides, *self._sizes),
            BLOCK_K=self._wide, BLOCK_Q=self._narrow, VOTED=votes is not None, MEAN=mean, **self._options,
        )  # fmt: skip


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
    seen,
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
    MASKED: tl.constexpr,
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
            if MASKED:
                m_seen = m_seen & (tl.load(seen + i_begin + o_k, mask=o_k < T, other=0) != 0)[None, :]
            b_score = tl.where(m_seen, b_score, -float("inf"))
            b_new = tl.maximum(b_peak, tl.max(b_score, 1))
            # No key yet: any finite number does, and it keeps -inf minus -inf out.
            b_zero = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp2(b_peak - b_zero) + tl.sum(tl.exp2(b_score - b_zero[:, None]), 1)
            b_peak = b_new
        # A query that sees nothing has no number here; the columns that it could reach are masked.
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
    seen,
    log_sums,
    votes,
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
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    VOTED: tl.constexpr,
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
            if VOTED:
                b_vote = tl.load(votes + i_h * TOTAL + i_begin + o_q, mask=o_q < T, other=0.0)
                b_share = b_share * b_vote[None, :]
            b_sum += tl.sum(b_share, 1)
        if MASKED:
            b_sum = tl.where(tl.load(seen + i_begin + o_k, mask=o_k < T, other=0) != 0, b_sum, 0.0)
        if MEAN:
            b_sum = b_sum / T
        tl.store(received + (i_begin + o_k) * stride_t + i_h * stride_h, b_sum, mask=o_k < T)
