"""The greedy loop of `max_min` and `max_sum` on one long segment, straight from the features: no matrix is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.shared.implementation import tl, triton

# Tokens and features a step.
STEP_TOKENS, STEP_DIM = 32, 256


def greedy_stream(
    features: Tensor,
    scales: Tensor,
    first: Tensor,
    picks: Tensor,
    *,
    total: bool = False,
    weights: Tensor | None = None,
) -> None:
    """Write the picks of a segment in pick order, each with the lowest affinity to those before it.

    Args:
        features: `[tokens, dim]`.
        scales: fp32 `[tokens]`, 1 / norm; 0 for a zero row, below 0 for a row to choose after all others.
        first: int64 `[1]`, the first pick.
        picks: int64 `[k]`, written.
        total: the affinity to the chosen set is the sum of cosines; otherwise the highest.
        weights: finite fp32 `[tokens]`; then the pick has the highest `weight * (1 - affinity)`.
    """
    device = features.device
    tokens, dim = features.shape
    running = torch.empty(tokens, dtype=torch.float32, device=device)
    best = torch.full((picks.numel(),), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)
    # The barrier needs all programs at once: one a multiprocessor. The interpreter runs them one after the other.
    programs, options = 1, {}
    if device.type == "cuda":
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        options = {"launch_cooperative_grid": True}
    _stream_kernel[(programs,)](
        *(features, *features.stride(), scales, scales if weights is None else weights, first, running, best, arrivals),
        *(picks, tokens, dim, picks.numel()),
        BLOCK_T=STEP_TOKENS, BLOCK_D=min(STEP_DIM, max(16, triton.next_power_of_2(dim))), TOTAL=total,
        WEIGHTED=weights is not None, num_warps=8, **options,
    )  # fmt: skip


@triton.jit
def _stream_kernel(
    features,
    stride_t,
    stride_d,
    scales,
    weights,
    seed,
    running,
    best,
    arrivals,
    picks,
    T,
    D,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOTAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The greedy loop of one long segment, all programs together, straight from the features.

    Each pick costs one pass over the features. The programs meet in `best[pick]`, an integer minimum over (affinity,
    index) that does not depend on their order, and at a counter which they only pass when all have arrived.
    """
    i_p = tl.program_id(0)
    P = tl.num_programs(0)
    i_pick = tl.load(seed).to(tl.int32)
    for i_k in range(0, K):
        if i_p == 0:
            tl.store(picks + i_k, i_pick.to(tl.int64))
        p_pick = features + i_pick.to(tl.int64) * stride_t
        scale = tl.load(scales + i_pick)
        b_best = tl.full([BLOCK_T], 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
        for i_t in range(i_p * BLOCK_T, T, P * BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_t = o_t < T
            p_row = features + o_t.to(tl.int64)[:, None] * stride_t
            b_sum = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
            for i_d in range(0, D, BLOCK_D):
                o_d = i_d + tl.arange(0, BLOCK_D)
                m_d = o_d < D
                b_pick = tl.load(p_pick + o_d.to(tl.int64) * stride_d, mask=m_d, other=0.0).to(tl.float32)
                b_row = tl.load(
                    p_row + o_d.to(tl.int64)[None, :] * stride_d, mask=m_t[:, None] & m_d[None, :], other=0.0
                )
                b_sum += b_row.to(tl.float32) * b_pick[None, :]  # [BLOCK_T, BLOCK_D]
            b_scale = tl.load(scales + o_t, mask=m_t, other=0.0)
            b_cosine = tl.where(b_scale > 0.0, tl.sum(b_sum, 1) * b_scale * scale, 0.0)
            b_cosine = tl.where(scale > 0.0, b_cosine, 0.0)
            if not TOTAL:
                # Equal rows, but for rounding.
                b_cosine = tl.where(b_cosine > 1.0 - 2.0**-17, 1.0, b_cosine)
            b_running = tl.load(running + o_t, mask=m_t & (i_k > 0), other=0.0 if TOTAL else -float("inf"))
            b_running = tl.where((b_scale < 0.0) & (i_k == 0), 3.4028234663852886e38, b_running)
            b_running = b_running + b_cosine if TOTAL else tl.maximum(b_running, b_cosine)
            b_running = tl.where(o_t == i_pick, float("inf"), b_running)
            tl.store(running + o_t, b_running, mask=m_t)
            if WEIGHTED:
                b_weight = tl.load(weights + o_t, mask=m_t, other=0.0)
                # A weight of 0 must not turn the infinity of a chosen token into NaN.
                b_running = tl.where(b_running < 3e38, -(b_weight * (1.0 - b_running)), b_running)
            b_running = tl.where(b_running == 0.0, 0.0, b_running)
            b_bits = b_running.to(tl.int32, bitcast=True)
            b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
            b_best = tl.minimum(b_best, tl.where(m_t, b_key | o_t.to(tl.int64), 0x7FFFFFFFFFFFFFFF))
        if i_k + 1 < K:
            tl.atomic_min(best + i_k, tl.min(b_best, 0), sem="release")
            tl.debug_barrier()
            tl.atomic_add(arrivals, 1, sem="acq_rel")
            while tl.atomic_add(arrivals, 0, sem="acquire") < (i_k + 1) * P:
                pass
            tl.debug_barrier()
            i_pick = (tl.load(best + i_k, volatile=True) & 0x7FFFFFFF).to(tl.int32)
