"""Farthest-point choice of tokens (max-min diversity), as DivPrune (arXiv 2503.02175) and greedy k-center use it.

With a weight per token it is the choice of ZOO-Prune (arXiv 2509.24837): sensitivity times distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.cosine_matrix import (
    LAST,
    MATRIX_LIMIT_BYTES,
    ROW_ALIGNMENT,
    TILE,
    cosine_matrices,
    cosine_matrix,
    cosines_to,
    groups_that_fit,
    nearest_others_triton,
    row_scales,
    unit_rows,
)
from vlmprune.kernels.shared.greedy_pools import farthest_from_nearest, greedy_in_pools
from vlmprune.kernels.shared.greedy_stream import greedy_stream
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton
from vlmprune.kernels.shared.segments import check_counts, check_offsets, check_seeds, on_device, running_starts

# Cosines above are those of equal rows, but for rounding, and count as 1. Behind merging in the vision tower many rows are equal,
# and rounding must not choose among them.
EQUAL = 1.0 - 2.0**-17


def max_min(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    k: Sequence[int] | Tensor,
    *,
    seeds: Sequence[int] | Tensor | None = None,
    weights: Tensor | None = None,
    metric: str = "cosine",
    implementation: str | None = None,
) -> Tensor:
    """Return `k[s]` tokens of every segment, each the farthest from those before it: local int64 `[sum k]`, pick order.

    The first pick is DivPrune's (the token whose nearest other token is farthest) or `seeds[s]`; each next one has the lowest
    of the highest fp32 cosines to the chosen tokens. Cosines within 2**-17 of 1 count as 1. Ties go to the lowest index and
    no token is chosen twice.
    A zero row has cosine 0 to everything; a row with NaN or inf too, and is chosen after all others.

    With weights the first pick has the highest weight, and each next one the highest `weight * (1 - cosine)`.

    Args:
        features: `[tokens, dim]` fp16, bf16 or fp32, any strides.
        offsets: `[segments + 1]` bounds in `features`; a segment may be empty. A GPU tensor costs one host sync.
        k: picks per segment, each in 0..length. A GPU tensor costs one host sync.
        seeds: first pick per segment, local; those of empty segments are not read.
        weights: `[tokens]`, any real dtype, 0 or more, compared in fp32; a token whose weight is not finite is chosen
            after all others.
        metric: "cosine"; for other distances see the op `max_min_from_distances`.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, metric, offset, count or seed.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be two-dimensional [tokens, dim]; got shape {tuple(features.shape)}.")
    if metric != "cosine":
        raise ValueError(f"metric={metric!r} is not 'cosine'; give other distances to max_min_from_distances.")
    if weights is not None and weights.shape != features.shape[:1]:
        raise ValueError(f"weights must be [{features.shape[0]}], one a token; got {tuple(weights.shape)}.")
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    counts = check_counts(k, bounds)
    firsts = None if seeds is None else check_seeds(seeds, bounds)
    greedy = max_min_triton if chosen == "triton" else max_min_reference
    return greedy(features, bounds, counts, firsts, weights)


def max_min_reference(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int] | None,
    weights: Tensor | None = None,
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`max_min` in plain torch, for arguments that are already checked."""
    picks = [torch.empty(0, dtype=torch.int64, device=features.device)]
    for segment, ((begin, end), count) in enumerate(zip(pairwise(bounds), counts, strict=True)):
        if count == 0:
            continue
        rows, last = unit_rows(features[begin:end])
        weight = None
        if weights is not None:
            weight = weights[begin:end].to(torch.float32)
            unusable = ~weight.isfinite() if last is None else last | ~weight.isfinite()
            last = unusable if bool(unusable.any()) else None
        seed = None if seeds is None else seeds[segment]
        matrix = cosine_matrix(rows, count, limit_bytes, whole=seed is None and weight is None)
        if seed is None and weight is None and matrix is None:
            seed = farthest_from_nearest(rows, last, snapped)
        elif seed is None:
            if weight is not None:
                lowest = -weight
            else:
                assert matrix is not None
                lowest = snapped(matrix.fill_diagonal_(-torch.inf).amax(1))
            seed = int((lowest if last is None else lowest.masked_fill(last, LAST)).argmin())
        if 4 * len(rows) ** 2 > limit_bytes:
            picks.append(greedy_in_pools(rows, seed, count, weight, last, snapped))
        else:
            picks.append(greedy_max_min(_Snapped(cosines_to(rows, matrix)), seed, count, weight, last))
    return torch.cat(picks)


def snapped(cosines: Tensor) -> Tensor:
    """Return cosines, those of equal rows exactly 1."""
    return cosines.masked_fill(cosines > EQUAL, 1.0)


class _Snapped:
    """Cosines to a pick, those of equal rows exactly 1."""

    def __init__(self, cosines: Callable[[int], Tensor]) -> None:
        self.cosines = cosines

    def __call__(self, pick: int) -> Tensor:
        return snapped(self.cosines(pick))


def greedy_max_min(
    affinity_to: Callable[[int], Tensor], seed: int, k: int, weight: Tensor | None, last: Tensor | None
) -> Tensor:
    """Return `k` picks in pick order, the seed first, from the affinities `[tokens]` of every token to a chosen one."""
    picks = [seed]
    running = affinity_to(seed).clone()
    if last is not None:
        running.masked_fill_(last, LAST)
    if weight is not None:
        weight = weight.clone() if last is None else weight.masked_fill(last, 1.0)
    for _ in range(k - 1):
        running[picks[-1]] = torch.inf
        if len(picks) > 1:
            torch.maximum(running, affinity_to(picks[-1]), out=running)
        if weight is None:
            picks.append(int(running.argmin()))
        else:
            # A weight of 0 would turn the infinity of a chosen token into NaN.
            weight[picks[-1]] = 1.0
            picks.append(int((1.0 - running).mul_(weight).argmax()))
    return torch.tensor(picks, dtype=torch.int64, device=running.device)


def max_min_triton(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int] | None,
    weights: Tensor | None = None,
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`max_min` in three launches: row scales, cosines with the seed rule's maxima, and the whole loop.

    Segments whose matrix would break the limit run one by one in a cooperative launch that reads the features again at
    every pick.
    """
    device = features.device
    starts = running_starts(counts)
    picks = torch.empty(starts[-1], dtype=torch.int64, device=device)
    if starts[-1] == 0:
        return picks
    if weights is not None:
        weights = weights.contiguous()
    scales = row_scales(features)
    groups, too_long = groups_that_fit(bounds, counts, limit_bytes)
    by_nearest = seeds is None and weights is None
    for group in groups:
        cosines = cosine_matrices(features, scales, bounds, counts, starts, group, maxima=by_nearest)
        firsts = cosines.table if seeds is None else on_device([seeds[segment] for segment in group], device)
        block = max(16, triton.next_power_of_2(cosines.longest))
        max_min_kernel[(len(group),)](
            *(cosines.values, scales, cosines.nearest, firsts, scales if weights is None else weights, cosines.table, picks),
            BLOCK=block, TILE=TILE, ALIGNMENT=ROW_ALIGNMENT, SEEDED=seeds is not None, SCALED=True,
            WEIGHTED=weights is not None, num_warps=loop_warps(block),
        )  # fmt: skip
    for segment in too_long:
        piece = slice(bounds[segment], bounds[segment + 1])
        part, part_scales, weight = features[piece], scales[piece], None
        if weights is not None:
            weight = weights[piece].to(torch.float32)
            unusable = ~weight.isfinite()
            part_scales, weight = part_scales.masked_fill(unusable, -1.0), weight.masked_fill(unusable, 1.0)
        if seeds is not None:
            first = on_device([seeds[segment]], device)
        else:
            lowest = -weight if weight is not None else nearest_others_triton(part, part_scales)
            if weight is None:
                lowest = lowest.masked_fill(lowest > EQUAL, 1.0)
            first = lowest.masked_fill(part_scales < 0, LAST).argmin()
        greedy_stream(part, part_scales, first, picks[starts[segment] : starts[segment + 1]], weights=weight)
    return picks


def loop_warps(block: int) -> int:
    """Warps for a block of so many tokens."""
    return min(16, max(4, block // 512))


@triton.jit
def max_min_kernel(
    affinity,
    scales,
    nearest,
    seeds,
    weights,
    table,
    picks,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SEEDED: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The greedy loop of one segment in one program; each token's highest affinity to the chosen stays in registers.

    One multiprocessor a segment: a pick costs one row of the matrix (from L2) and one reduction, less than the barrier
    that sharing a segment would need.
    """
    i_s = tl.program_id(0)
    p_table = table + i_s * 6
    i_begin = tl.load(p_table)
    length = tl.load(p_table + 1)
    T = length.to(tl.int32)
    K = tl.load(p_table + 2).to(tl.int32)
    p_picks = picks + tl.load(p_table + 3)
    p_affinity = affinity + tl.multiple_of(tl.load(p_table + 4), ALIGNMENT)
    stride = (T + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    o_t = tl.arange(0, BLOCK)
    m_t = o_t < T
    m_last = m_t & (o_t < 0)
    if SCALED:
        m_last = m_t & (tl.load(scales + i_begin + o_t, mask=m_t, other=0.0) < 0.0)
    if WEIGHTED:
        b_weight = tl.load(weights + i_begin + o_t, mask=m_t, other=0.0).to(tl.float32)
        # Also true for NaN.
        m_last = m_last | (m_t & ~(tl.abs(b_weight) < float("inf")))

    if SEEDED:
        i_pick = tl.load(seeds + i_s).to(tl.int32)
    elif WEIGHTED:
        b_first = tl.where(m_last, 3.4028234663852886e38, -b_weight)
        i_pick = tl.argmin(tl.where(m_t, b_first, float("inf")), 0)
    else:
        p_nearest = nearest + tl.load(p_table + 5)
        b_nearest = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
        for i_tile in range(0, (T + TILE - 1) // TILE):
            p_tile = p_nearest + i_tile * length
            b_nearest = tl.maximum(b_nearest, tl.load(p_tile + o_t, mask=m_t, other=-float("inf")))
        if SCALED:
            b_nearest = tl.where(b_nearest > 1.0 - 2.0**-17, 1.0, b_nearest)
        b_nearest = tl.where(m_last, 3.4028234663852886e38, b_nearest)
        i_pick = tl.argmin(tl.where(m_t, b_nearest, float("inf")), 0)

    b_running = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    b_running = tl.where(m_last, 3.4028234663852886e38, b_running)
    b_running = tl.where(m_t, b_running, float("inf"))
    for i_k in range(0, K):
        tl.store(p_picks + i_k, i_pick.to(tl.int64))
        # The mask ends at a multiple of the alignment, which lets the loads be wide; the padding is not initialised.
        b_row = tl.load(p_affinity + i_pick.to(tl.int64) * stride + o_t, mask=o_t < stride, other=0.0)
        b_row = tl.where(m_t, b_row, 0.0)
        if SCALED:
            b_row = tl.where(b_row > 1.0 - 2.0**-17, 1.0, b_row)
        b_running = tl.maximum(b_running, b_row)
        b_running = tl.where(o_t == i_pick, float("inf"), b_running)
        if WEIGHTED:
            # A weight of 0 must not turn the infinity of a chosen token into NaN.
            b_key = tl.where(b_running < 3e38, -(b_weight * (1.0 - b_running)), b_running)
            i_pick = tl.argmin(b_key, 0)
        else:
            i_pick = tl.argmin(b_running, 0)


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype} {tokens}{' weighted' if weighted else ''}{' seeded' if seeds else ''}", max_min_triton,
        (Like(dtype, (tokens, 1024)), [0, tokens], [64], seeds, Like(torch.float32, (tokens,)) if weighted else None),
        {"limit_bytes": limit},
    )
    for dtype, tokens, weighted, seeds, limit in (
        (torch.bfloat16, 576, False, None, MATRIX_LIMIT_BYTES), (torch.float32, 2880, False, None, MATRIX_LIMIT_BYTES),
        (torch.bfloat16, 14000, True, None, MATRIX_LIMIT_BYTES), (torch.bfloat16, 14000, False, [3], MATRIX_LIMIT_BYTES),
        (torch.bfloat16, 2880, False, None, 0), (torch.float32, 2880, True, None, 0),
    )
)  # fmt: skip
