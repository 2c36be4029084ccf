"""Attention of a few chosen query rows (the CLS token, the last prompt token) over all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, dot_needs_fp32, tl, triton

REDUCTIONS = ("none", "mean", "sum")

# Keys a program takes: small enough that one image already fills a GPU.
LOGIT_KEYS = 64
FINISH_KEYS = 128


def row_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    reduce: str = "none",
    logits: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Return `softmax(scale * query key^T)` of the given rows: fp32 `[batch, rows, heads, keys]`.

    Args:
        query: `[batch, rows, heads, head_dim]`, any strides.
        key: `[batch, keys, kv_heads, head_dim]`; `heads` must be a multiple of `kv_heads` (grouped queries).
        scale: factor of the logits; None for `head_dim ** -0.5`.
        mask: bool `[batch, keys]` or `[batch, rows, keys]`, True where a row may look. Masked keys get 0, or -inf as
            logits; a row that sees no key gets 0 everywhere.
        reduce: "none", or the "mean" or "sum" over heads: `[batch, rows, keys]`.
        logits: leave the softmax out.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape or reduction.
        KernelUnavailableError: the forced implementation cannot run.
    """
    _check(query, key, mask, reduce)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if choose_implementation(query.device, implementation) == "triton":
        return _row_attention_triton(query, key, scale, mask, reduce, logits)
    return row_attention_reference(query, key, scale, mask, reduce, logits)


def row_attention_reference(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, reduce: str, logits: bool
) -> Tensor:
    """`row_attention` in plain torch, for arguments that are already checked."""
    batch, rows, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = (query.to(torch.float32) * scale).reshape(batch, rows, kv_heads, heads // kv_heads, head_dim)
    queries = grouped.permute(0, 2, 1, 3, 4).reshape(batch, kv_heads, rows * (heads // kv_heads), head_dim)
    scores = queries @ key.to(torch.float32).permute(0, 2, 3, 1)
    # Views, so that nothing is copied where heads are reduced.
    scores = scores.view(batch, kv_heads, rows, heads // kv_heads, keys).permute(0, 2, 1, 3, 4)
    hidden = None
    if mask is not None:
        hidden = ~(mask[:, None] if mask.dim() == 2 else mask)[:, :, None, None, :]
        scores.masked_fill_(hidden, -torch.inf)
    if not logits:
        scores = scores.softmax(-1)
        if hidden is not None:
            scores = scores.masked_fill(hidden, 0.0)
    if reduce == "none":
        return scores.reshape(batch, rows, heads, keys)
    return scores.mean((2, 3)) if reduce == "mean" else scores.sum((2, 3))


def _row_attention_triton(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, reduce: str, logits: bool
) -> Tensor:
    batch, rows, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    scores = torch.empty(batch, rows, heads, keys, dtype=torch.float32, device=query.device)
    result = scores if reduce == "none" else torch.empty(batch, rows, keys, dtype=torch.float32, device=query.device)
    if scores.numel() == 0:
        return result.zero_()
    blocks = triton.cdiv(keys, LOGIT_KEYS)
    # The highest logit of every block of keys, and the sum of exponentials below it.
    peaks = torch.empty(batch, rows, heads, blocks, dtype=torch.float32, device=query.device)
    sums = torch.empty_like(peaks)
    if mask is None:
        seen, mask_strides = query, (0, 0, 0)
    else:
        seen = mask.view(torch.uint8)
        mask_strides = (seen.stride(0), seen.stride(1) if seen.dim() == 3 else 0, seen.stride(-1))
    group_rows = rows * (heads // kv_heads)
    # Products without tensor cores hold their operands in registers: smaller tiles, more warps, or they spill.
    scalar = dot_needs_fp32(query, key) or query.dtype == torch.float32
    block_rows = min(16 if scalar else 64, max(16, triton.next_power_of_2(group_rows)))
    _logit_kernel[(blocks, triton.cdiv(group_rows, block_rows), batch * kv_heads)](
        *(query, *query.stride(), key, *key.stride(), seen, *mask_strides, scores, peaks, sums, scale),
        *(rows, heads, kv_heads, keys, head_dim, blocks),
        BLOCK_R=block_rows, BLOCK_L=LOGIT_KEYS, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        MASKED=mask is not None, UPCAST=dot_needs_fp32(query, key), SOFTMAX=not logits,
        num_warps=8 if scalar else 4, num_stages=1,
    )  # fmt: skip
    if logits and reduce == "none":
        return result
    _finish_kernel[(triton.cdiv(keys, FINISH_KEYS), batch * rows)](
        *(scores, peaks, sums, result, heads, keys, blocks, 1.0 / heads if reduce == "mean" else 1.0),
        BLOCK_H=min(16, triton.next_power_of_2(heads)), BLOCK_L=FINISH_KEYS, BLOCK_N=triton.next_power_of_2(blocks),
        SOFTMAX=not logits, REDUCE=reduce != "none", num_warps=4,
    )  # fmt: skip
    return result


@triton.jit
def _logit_kernel(
    query,
    stride_qb,
    stride_qr,
    stride_qh,
    stride_qd,
    key,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_kd,
    mask,
    stride_mb,
    stride_mr,
    stride_ml,
    scores,
    peaks,
    sums,
    scale,
    R,
    H,
    KV,
    L,
    D,
    N,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Logits of one block of keys for all query rows that share a key head, so that each key is read once."""
    i_l = tl.program_id(0)
    i_b = (tl.program_id(2) // KV).to(tl.int64)
    i_kv = tl.program_id(2) % KV
    G = H // KV
    o_g = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_r = o_g // G
    o_h = i_kv * G + o_g % G
    o_l = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_g < R * G
    m_l = o_l < L
    p_q = query + i_b * stride_qb + (o_r.to(tl.int64) * stride_qr + o_h.to(tl.int64) * stride_qh)[:, None]
    p_k = key + i_b * stride_kb + i_kv.to(tl.int64) * stride_kh + o_l.to(tl.int64)[:, None] * stride_kl
    b_q = tl.load(p_q + o_d[None, :] * stride_qd, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    b_k = tl.load(p_k + o_d[None, :] * stride_kd, mask=m_l[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
        b_k = b_k.to(tl.float32)
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_R, BLOCK_L]
    if MASKED:
        p_m = mask + i_b * stride_mb + o_r.to(tl.int64)[:, None] * stride_mr + o_l.to(tl.int64)[None, :] * stride_ml
        b_seen = tl.load(p_m, mask=m_r[:, None] & m_l[None, :], other=0)
        b_score = tl.where(b_seen != 0, b_score, -float("inf"))
    p_row = (i_b * R + o_r) * H + o_h
    tl.store(scores + p_row[:, None] * L + o_l[None, :], b_score, mask=m_r[:, None] & m_l[None, :])
    if SOFTMAX:
        b_score = tl.where(m_l[None, :], b_score, -float("inf"))
        b_peak = tl.max(b_score, 1)
        b_zero = tl.where(b_peak == -float("inf"), 0.0, b_peak)
        b_sum = tl.sum(tl.exp(b_score - b_zero[:, None]), 1)
        tl.store(peaks + p_row * N + i_l, b_peak, mask=m_r)
        tl.store(sums + p_row * N + i_l, b_sum, mask=m_r)


@triton.jit
def _finish_kernel(
    scores,
    peaks,
    sums,
    result,
    H,
    L,
    N,
    factor,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTMAX: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Normalise the logits of one query row and one block of keys, and add up the heads in order."""
    i_r = tl.program_id(1).to(tl.int64)
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_n = tl.arange(0, BLOCK_N)
    m_l = o_l < L
    b_total = tl.zeros([BLOCK_L], dtype=tl.float32)
    for i_h in range(0, H, BLOCK_H):
        o_h = i_h + tl.arange(0, BLOCK_H)
        m_h = o_h < H
        p_h = i_r * H + o_h
        m_tile = m_h[:, None] & m_l[None, :]
        b_score = tl.load(scores + p_h[:, None] * L + o_l[None, :], mask=m_tile, other=0.0)  # [BLOCK_H, BLOCK_L]
        if SOFTMAX:
            m_n = m_h[:, None] & (o_n < N)[None, :]
            b_peaks = tl.load(peaks + p_h[:, None] * N + o_n[None, :], mask=m_n, other=-float("inf"))
            b_sums = tl.load(sums + p_h[:, None] * N + o_n[None, :], mask=m_n, other=0.0)
            b_peak = tl.max(b_peaks, 1)
            b_zero = tl.where(b_peak == -float("inf"), 0.0, b_peak)
            b_sum = tl.sum(b_sums * tl.exp(b_peaks - b_zero[:, None]), 1)
            b_hidden = b_score == -float("inf")
            b_score = tl.exp(b_score - b_zero[:, None]) / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
            b_score = tl.where(b_hidden, 0.0, b_score)
        if REDUCE:
            b_total += tl.sum(tl.where(m_h[:, None], b_score, 0.0), 0)
        else:
            tl.store(result + p_h[:, None] * L + o_l[None, :], b_score, mask=m_tile)
    if REDUCE:
        tl.store(result + i_r * L + o_l, b_total * factor, mask=m_l)


def _check(query: Tensor, key: Tensor, mask: Tensor | None, reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is not one of {', '.join(REDUCTIONS)}.")
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            "query must be [batch, rows, heads, head_dim] and key [batch, keys, kv_heads, head_dim]; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[2] % max(key.shape[2], 1):
        raise ValueError(
            "query and key must agree in batch and head_dim, and heads must be a multiple of kv_heads; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if mask is not None:
        allowed = ((query.shape[0], key.shape[1]), (query.shape[0], query.shape[1], key.shape[1]))
        if mask.dtype != torch.bool or tuple(mask.shape) not in allowed:
            raise ValueError(
                f"mask must be bool of shape {allowed[0]} or {allowed[1]}; got {mask.dtype} {tuple(mask.shape)}."
            )


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype} {rows} rows{' reduced' if reduce != 'none' else ''}{' masked' if masked else ''}", _row_attention_triton,
        (
            Like(dtype, (2, rows, 32, 128)), Like(dtype, (2, 2928, 8, 128)), 0.1,
            Like(torch.bool, (2, 2928)) if masked else None, reduce, logits,
        ),
    )
    for dtype, rows, masked, reduce, logits in (
        (torch.bfloat16, 1, False, "mean", False), (torch.bfloat16, 16, True, "none", False),
        (torch.float32, 1, False, "sum", False), (torch.float32, 16, True, "none", True),
    )
)  # fmt: skip
