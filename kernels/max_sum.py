"""Greedy max-sum diversification, the first stage of ToDRE (arXiv 2505.18757)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.cosine_matrix import (
    LAST,
    MATRIX_LIMIT_BYTES,
    ROW_ALIGNMENT,
    cosine_matrices,
    cosine_matrix,
    cosines_to,
    groups_that_fit,
    row_scales,
    unit_rows,
)
from vlmprune.kernels.shared.greedy_stream import greedy_stream
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton
from vlmprune.kernels.shared.segments import check_counts, check_offsets, check_seeds, on_device, running_starts


def max_sum(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    k: Sequence[int] | Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Return `k[s]` tokens of every segment, each the least similar in sum to those before it: local int64 `[sum k]`.

    In pick order, from `seeds[s]` on; each next pick has the lowest fp32 sum of cosines to all chosen tokens. Ties go
    to the lowest index and no token is chosen twice. Zero rows and rows with NaN or inf count as in `max_min`.

    Args:
        features: `[tokens, dim]` fp16, bf16 or fp32, any strides.
        offsets: `[segments + 1]` bounds in `features`; a segment may be empty. A GPU tensor costs one host sync.
        k: picks per segment, each in 0..length. A GPU tensor costs one host sync.
        seeds: first pick per segment, local; those of empty segments are not read.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, offset, count or seed.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be two-dimensional [tokens, dim]; got shape {tuple(features.shape)}.")
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    counts = check_counts(k, bounds)
    greedy = max_sum_triton if chosen == "triton" else max_sum_reference
    return greedy(features, bounds, counts, check_seeds(seeds, bounds))


def max_sum_reference(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int],
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`max_sum` in plain torch, for arguments that are already checked."""
    picks = []
    for segment, ((begin, end), count) in enumerate(zip(pairwise(bounds), counts, strict=True)):
        if count == 0:
            continue
        rows, broken = unit_rows(features[begin:end])
        affinity_to = cosines_to(rows, cosine_matrix(rows, count, limit_bytes))
        picks.append(seeds[segment])
        running = affinity_to(picks[-1]).clone()
        if broken is not None:
            running.masked_fill_(broken, LAST)
        for i in range(count - 1):
            running[picks[-1]] = torch.inf
            if i:
                running += affinity_to(picks[-1])
            picks.append(int(running.argmin()))
    return torch.tensor(picks, dtype=torch.int64, device=features.device)


def max_sum_triton(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int],
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`max_sum` in three launches: row scales, cosines, and the whole loop; long segments as in `max_min`."""
    device = features.device
    starts = running_starts(counts)
    picks = torch.empty(starts[-1], dtype=torch.int64, device=device)
    if starts[-1] == 0:
        return picks
    scales = row_scales(features)
    groups, too_long = groups_that_fit(bounds, counts, limit_bytes)
    for group in groups:
        cosines = cosine_matrices(features, scales, bounds, counts, starts, group)
        block = max(16, triton.next_power_of_2(cosines.longest))
        _max_sum_kernel[(len(group),)](
            *(cosines.values, scales, on_device([seeds[segment] for segment in group], device), cosines.table, picks),
            BLOCK=block, ALIGNMENT=ROW_ALIGNMENT, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    for segment in too_long:
        piece, out = slice(bounds[segment], bounds[segment + 1]), picks[starts[segment] : starts[segment + 1]]
        greedy_stream(features[piece], scales[piece], on_device([seeds[segment]], device), out, total=True)
    return picks


@triton.jit
def _max_sum_kernel(
    affinity,
    scales,
    seeds,
    table,
    picks,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The greedy loop of one segment in one program; each token's sum of cosines stays in registers.

    One multiprocessor a segment: a pick costs one row of the matrix (from L2) and one reduction, less than the barrier
    that sharing a segment would need.
    """
    i_s = tl.program_id(0)
    p_table = table + i_s * 6
    i_begin = tl.load(p_table)
    T = tl.load(p_table + 1).to(tl.int32)
    K = tl.load(p_table + 2).to(tl.int32)
    p_picks = picks + tl.load(p_table + 3)
    p_affinity = affinity + tl.multiple_of(tl.load(p_table + 4), ALIGNMENT)
    stride = (T + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    o_t = tl.arange(0, BLOCK)
    m_t = o_t < T
    m_last = m_t & (tl.load(scales + i_begin + o_t, mask=m_t, other=0.0) < 0.0)

    i_pick = tl.load(seeds + i_s).to(tl.int32)
    b_running = tl.where(m_last, 3.4028234663852886e38, tl.zeros([BLOCK], dtype=tl.float32))
    b_running = tl.where(m_t, b_running, float("inf"))
    for i_k in range(0, K):
        tl.store(p_picks + i_k, i_pick.to(tl.int64))
        # The mask ends at a multiple of the alignment, which lets the loads be wide; the padding is not initialised.
        b_row = tl.load(p_affinity + i_pick.to(tl.int64) * stride + o_t, mask=o_t < stride, other=0.0)
        b_row = tl.where(m_t, b_row, 0.0)
        b_running += b_row
        b_running = tl.where(o_t == i_pick, float("inf"), b_running)
        i_pick = tl.argmin(b_running, 0)


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype} {tokens}", max_sum_triton, (Like(dtype, (tokens, 1024)), [0, tokens], [64], [3]), {"limit_bytes": limit}
    )
    for dtype, tokens, limit in (
        (torch.bfloat16, 576, MATRIX_LIMIT_BYTES), (torch.bfloat16, 14000, MATRIX_LIMIT_BYTES), (torch.bfloat16, 2880, 0)
    )
)  # fmt: skip
