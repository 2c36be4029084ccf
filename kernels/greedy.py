"""Greedy choice of diverse tokens: the one loop behind `max_min` (farthest point) and `max_sum`.

Both work on affinities (cosine similarity, or a negated distance). Each token carries its affinity to the chosen set,
the highest ("max") or the total ("sum"); the token with the lowest one is chosen next, the lowest index on ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.implementation import dot_needs_fp32, tl, triton, triton_is_interpreted
from vlmprune.kernels.segments import on_device, running_starts

# The affinities of one segment are kept whole up to this size; above it they are computed from the features again.
GRAM_LIMIT_BYTES = 768 * 2**20

# Side of the square tiles of the affinity matrix, and tokens and features a step of the kernel that keeps no matrix.
TILE = 128
STEP_TOKENS, STEP_DIM = 32, 256

# Rows of a kept matrix begin at multiples of this many elements, so that the loop's loads are wide.
ROW_ALIGNMENT = 32

# Stands for "after every proper token": above all cosines and finite distances, below the +inf of a chosen token.
LAST = torch.finfo(torch.float32).max


def unit_rows(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return fp32 rows of length one and the mask of rows that cannot be compared, None if there are none.

    A zero row stays zero, so its cosine to every token is 0. A row with NaN, inf or a norm beyond fp32 becomes zero
    too, and the mask marks it: it is chosen after all others.
    """
    rows = features.to(torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    broken = ~norms.isfinite()
    norms.masked_fill_(norms == 0, 1.0)
    # In place where the rows are a copy already: a video's features are hundreds of megabytes.
    rows = rows / norms if rows is features else rows.div_(norms)
    return (rows.masked_fill_(broken, 0.0), broken.squeeze(-1)) if bool(broken.any()) else (rows, None)


def greedy_reference(
    affinity_to: Callable[[int], Tensor], seed: int, k: int, total: bool, last: Tensor | None
) -> Tensor:
    """Return `k` picks in pick order, int64 `[k]`, the seed first.

    Args:
        affinity_to: gives the fp32 affinities `[tokens]` of every token to a chosen one.
        total: add the affinities up instead of keeping the highest.
        last: bool `[tokens]`, tokens to choose after all others.
    """
    picks = [seed]
    running = affinity_to(seed).clone()
    if last is not None:
        running.masked_fill_(last, LAST)
    combine = torch.add if total else torch.maximum
    for _ in range(k - 1):
        running[picks[-1]] = torch.inf
        if len(picks) > 1:
            combine(running, affinity_to(picks[-1]), out=running)
        picks.append(int(running.argmin()))
    return torch.tensor(picks[:k], dtype=torch.int64, device=running.device)


def lowest_row_maximum(nearest: Tensor, last: Tensor | None) -> int:
    """Return the token whose nearest other token is farthest, from each token's affinity to its nearest `[tokens]`."""
    return int((nearest if last is None else nearest.masked_fill(last, LAST)).argmin())


def features_reference(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int] | None,
    *,
    total: bool,
    gram_limit_bytes: int = GRAM_LIMIT_BYTES,
) -> Tensor:
    """The greedy choice by cosine in every segment of `features` `[tokens, dim]`, int64 `[sum counts]`."""
    picks = [features.new_empty(0, dtype=torch.int64, device=features.device)]
    for segment, ((begin, end), count) in enumerate(zip(pairwise(bounds), counts, strict=True)):
        if count == 0:
            continue
        rows, broken = unit_rows(features[begin:end])
        seed = None if seeds is None else seeds[segment]
        length = end - begin
        # A product with one chosen row reads all features; past about one pick in sixteen the whole matrix is cheaper.
        if (seed is None or count * 16 > length) and 4 * length**2 <= gram_limit_bytes:
            gram = rows @ rows.T
            if seed is None:
                seed = lowest_row_maximum(gram.fill_diagonal_(-torch.inf).amax(1), broken)
            picks.append(greedy_reference(gram.__getitem__, seed, count, total, broken))
        else:
            if seed is None:
                seed = lowest_row_maximum(_nearest_by_blocks(rows), broken)
            picks.append(greedy_reference(partial(_cosines, rows), seed, count, total, broken))
    return torch.cat(picks)


def _cosines(rows: Tensor, pick: int) -> Tensor:
    return rows @ rows[pick]


def _nearest_by_blocks(rows: Tensor, block: int = 1024) -> Tensor:
    nearest = []
    for begin in range(0, rows.shape[0], block):
        part = rows[begin : begin + block] @ rows.T
        part.diagonal(begin).fill_(-torch.inf)
        nearest.append(part.amax(1))
    return torch.cat(nearest)


def features_triton(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int] | None,
    *,
    total: bool,
    gram_limit_bytes: int = GRAM_LIMIT_BYTES,
) -> Tensor:
    """`features_reference` in three launches: row scales, affinities with the seed rule's maxima, and the whole loop.

    The products are taken on the stored rows with fp32 sums and scaled afterwards, so fp16 and bf16 features use the
    tensor cores without losing a bit; fp32 features are multiplied in IEEE fp32. Segments whose matrix would break the
    limit run one by one in a cooperative launch that reads the features again at every pick.
    """
    device = features.device
    starts = running_starts(counts)
    picks = torch.empty(starts[-1], dtype=torch.int64, device=device)
    tokens, dim = features.shape
    if starts[-1] == 0:
        return picks
    scales = torch.empty(tokens, dtype=torch.float32, device=device)
    strides = features.stride()
    block_dim = min(1024, max(16, triton.next_power_of_2(dim)))
    _scale_kernel[(triton.cdiv(tokens, 4),)](
        features, *strides, scales, tokens, dim, BLOCK_T=4, BLOCK_D=block_dim, num_warps=4
    )

    kept: list[int] = []
    size = 0
    for segment, (begin, end) in enumerate(pairwise(bounds)):
        if counts[segment] == 0:
            continue
        bytes_needed = 4 * _row_stride(end - begin) * (end - begin)
        if bytes_needed > gram_limit_bytes:
            seed = None if seeds is None else seeds[segment]
            out = picks[starts[segment] : starts[segment + 1]]
            _without_matrix(features[begin:end], scales[begin:end], seed, out, total)
            continue
        if kept and size + bytes_needed > gram_limit_bytes:
            _with_matrix(features, scales, bounds, counts, starts, seeds, kept, picks, total)
            kept, size = [], 0
        kept.append(segment)
        size += bytes_needed
    if kept:
        _with_matrix(features, scales, bounds, counts, starts, seeds, kept, picks, total)
    return picks


def affinity_triton(affinity: Tensor, seed: Tensor, k: int) -> Tensor:
    """`greedy_reference` (highest affinity) for a whole fp32 matrix `[tokens, tokens]` on the device, one launch."""
    tokens = affinity.shape[0]
    stride = _row_stride(tokens)
    padded = torch.empty(tokens, stride, dtype=torch.float32, device=affinity.device)
    padded[:, :tokens] = affinity
    picks = torch.empty(k, dtype=torch.int64, device=affinity.device)
    table = on_device([0, tokens, k, 0, 0, 0], affinity.device)
    block = triton.next_power_of_2(tokens)
    _loop_kernel[(1,)](
        *(padded, padded, padded, seed.view(1), table, picks),
        BLOCK=block, TILE=TILE, ALIGNMENT=ROW_ALIGNMENT, SEEDED=True, SCALED=False, TOTAL=False,
        num_warps=_loop_warps(block),
    )  # fmt: skip
    return picks


def _with_matrix(
    features: Tensor,
    scales: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    starts: Sequence[int],
    seeds: Sequence[int] | None,
    kept: Sequence[int],
    picks: Tensor,
    total: bool,
) -> None:
    device = features.device
    lengths = [bounds[segment + 1] - bounds[segment] for segment in kept]
    tiles = [triton.cdiv(length, TILE) for length in lengths]
    grams = running_starts([_row_stride(length) * length for length in lengths])
    maxima = running_starts([count * length for count, length in zip(tiles, lengths, strict=True)])
    # One row per kept segment: first token, tokens, picks, and where its picks, matrix and maxima begin.
    table = on_device(
        [
            number
            for i, segment in enumerate(kept)
            for number in (bounds[segment], lengths[i], counts[segment], starts[segment], grams[i], maxima[i])
        ]
        + [0 if seeds is None else seeds[segment] for segment in kept],
        device,
    )
    firsts = table[6 * len(kept) :]
    gram = torch.empty(grams[-1], dtype=torch.float32, device=device)
    nearest = torch.empty(maxima[-1] if seeds is None else 1, dtype=torch.float32, device=device)
    most = max(tiles)
    _launch_affinity(features, scales, table, gram, nearest, (most * (most + 1) // 2, len(kept)), seeds is None, True)
    block = max(16, triton.next_power_of_2(max(lengths)))
    _loop_kernel[(len(kept),)](
        *(gram, scales, nearest, firsts, table, picks),
        BLOCK=block, TILE=TILE, ALIGNMENT=ROW_ALIGNMENT, SEEDED=seeds is not None, SCALED=True, TOTAL=total,
        num_warps=_loop_warps(block),
    )  # fmt: skip


def _without_matrix(features: Tensor, scales: Tensor, seed: int | None, picks: Tensor, total: bool) -> None:
    device = features.device
    tokens, dim = features.shape
    if seed is None:
        tiles = triton.cdiv(tokens, TILE)
        nearest = torch.empty(tiles, tokens, dtype=torch.float32, device=device)
        table = on_device([0, tokens, 0, 0, 0, 0], device)
        _launch_affinity(features, scales, table, nearest, nearest, (tiles * (tiles + 1) // 2, 1), True, False)
        first = nearest.amax(0).masked_fill_(scales < 0, LAST).argmin()
    else:
        first = on_device([seed], device)
    running = torch.empty(tokens, dtype=torch.float32, device=device)
    best = torch.full((picks.numel(),), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
    arrivals = torch.zeros(1, dtype=torch.int32, device=device)
    # The barrier needs all programs at once: one a multiprocessor. The interpreter runs them one after the other.
    programs, options = 1, {}
    if not triton_is_interpreted():
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        options = {"launch_cooperative_grid": True}
    _stream_kernel[(programs,)](
        *(features, *features.stride(), scales, first, running, best, arrivals, picks, tokens, dim, picks.numel()),
        BLOCK_T=STEP_TOKENS, BLOCK_D=min(STEP_DIM, max(16, triton.next_power_of_2(dim))), TOTAL=total, num_warps=8,
        **options,
    )  # fmt: skip


def _launch_affinity(
    features: Tensor,
    scales: Tensor,
    table: Tensor,
    gram: Tensor,
    nearest: Tensor,
    grid: tuple[int, int],
    maxima: bool,
    keep: bool,
) -> None:
    dim = features.shape[1]
    block_dim = min(128 // features.element_size(), max(16, triton.next_power_of_2(dim)))
    _affinity_kernel[grid](
        *(features, *features.stride(), scales, table, gram, nearest, dim),
        TILE=TILE, BLOCK_D=block_dim, ALIGNMENT=ROW_ALIGNMENT, MAXIMA=maxima, KEEP=keep, UPCAST=dot_needs_fp32(features),
        num_warps=8, num_stages=3,
    )  # fmt: skip


def _row_stride(tokens: int) -> int:
    return -(-tokens // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _loop_warps(block: int) -> int:
    return min(16, max(4, block // 512))


@triton.jit
def _scale_kernel(features, stride_t, stride_d, scales, T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / norm of each row; 0 for a zero row, -1 for a row whose norm is not finite."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    b_square = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        p_row = features + o_t.to(tl.int64)[:, None] * stride_t + o_d.to(tl.int64)[None, :] * stride_d
        b_row = tl.load(p_row, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        b_square += b_row * b_row
    b_norm = tl.sqrt_rn(tl.sum(b_square, 1))
    b_scale = tl.where(b_norm == 0.0, 0.0, tl.div_rn(1.0, tl.where(b_norm == 0.0, 1.0, b_norm)))
    # Also false for NaN.
    b_scale = tl.where(b_norm < float("inf"), b_scale, -1.0)
    tl.store(scales + o_t, b_scale, mask=m_t)


@triton.jit
def _affinity_kernel(
    features,
    stride_t,
    stride_d,
    scales,
    table,
    gram,
    nearest,
    D,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    MAXIMA: tl.constexpr,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Cosines of the upper triangle's tiles, written on both sides of the diagonal.

    With MAXIMA also `nearest[tile, token]`, the highest cosine of a token to the *other* tokens of each tile.
    """
    i_p = tl.program_id(0)
    p_table = table + tl.program_id(1) * 6
    i_begin = tl.load(p_table)
    T = tl.load(p_table + 1).to(tl.int32)
    # Programs count the triangle row by row; the root may be off by one where p is large.
    i_r = ((tl.sqrt(8.0 * i_p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_r = tl.where(i_r * (i_r + 1) // 2 > i_p, i_r - 1, i_r)
    i_r = tl.where((i_r + 1) * (i_r + 2) // 2 <= i_p, i_r + 1, i_r)
    i_c = i_p - i_r * (i_r + 1) // 2

    if i_r * TILE < T:
        o_r = i_r * TILE + tl.arange(0, TILE)
        o_c = i_c * TILE + tl.arange(0, TILE)
        m_r = o_r < T
        m_c = o_c < T
        # Rows past the end repeat the last one, so that no load needs a row mask; nothing of them is written.
        p_r = features + (i_begin + tl.minimum(o_r, T - 1).to(tl.int64))[:, None] * stride_t
        p_c = features + (i_begin + tl.minimum(o_c, T - 1).to(tl.int64))[:, None] * stride_t
        b_cosine = tl.zeros([TILE, TILE], dtype=tl.float32)
        for i_d in range(0, D, BLOCK_D):
            o_d = (i_d + tl.arange(0, BLOCK_D))[None, :]
            b_r = tl.load(p_r + o_d.to(tl.int64) * stride_d, mask=o_d < D, other=0.0)  # [TILE, BLOCK_D]
            b_c = tl.load(p_c + o_d.to(tl.int64) * stride_d, mask=o_d < D, other=0.0)  # [TILE, BLOCK_D]
            if UPCAST:
                b_r = b_r.to(tl.float32)
                b_c = b_c.to(tl.float32)
            b_cosine = tl.dot(b_r, tl.trans(b_c), b_cosine, input_precision="ieee")
        b_scale_r = tl.load(scales + i_begin + o_r, mask=m_r, other=0.0)
        b_scale_c = tl.load(scales + i_begin + o_c, mask=m_c, other=0.0)
        m_both = (b_scale_r > 0.0)[:, None] & (b_scale_c > 0.0)[None, :]
        b_cosine = tl.where(m_both, b_cosine * b_scale_r[:, None] * b_scale_c[None, :], 0.0)

        if MAXIMA:
            p_nearest = nearest + tl.load(p_table + 5)
            m_other = o_r[:, None] != o_c[None, :]
            b_row = tl.max(tl.where(m_other & m_c[None, :], b_cosine, -float("inf")), 1)
            tl.store(p_nearest + i_c.to(tl.int64) * T + o_r, b_row, mask=m_r)
            if i_r != i_c:
                b_column = tl.max(tl.where(m_other & m_r[:, None], b_cosine, -float("inf")), 0)
                tl.store(p_nearest + i_r.to(tl.int64) * T + o_c, b_column, mask=m_c)
        if KEEP:
            stride = (T + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
            p_gram = gram + tl.multiple_of(tl.load(p_table + 4), ALIGNMENT)
            tl.store(
                p_gram + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], b_cosine, mask=m_r[:, None] & m_c[None, :]
            )
            if i_r != i_c:
                b_mirror = tl.trans(b_cosine)
                tl.store(
                    p_gram + o_c.to(tl.int64)[:, None] * stride + o_r[None, :],
                    b_mirror,
                    mask=m_c[:, None] & m_r[None, :],
                )


@triton.jit
def _loop_kernel(
    gram,
    scales,
    nearest,
    seeds,
    table,
    picks,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SEEDED: tl.constexpr,
    SCALED: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """The greedy loop of one segment in one program; each token's affinity to the chosen set stays in registers.

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
    p_gram = gram + tl.multiple_of(tl.load(p_table + 4), ALIGNMENT)
    stride = (T + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    o_t = tl.arange(0, BLOCK)
    m_t = o_t < T
    m_last = m_t & (o_t < 0)
    if SCALED:
        m_last = m_t & (tl.load(scales + i_begin + o_t, mask=m_t, other=0.0) < 0.0)

    if SEEDED:
        i_pick = tl.load(seeds + i_s).to(tl.int32)
    else:
        p_nearest = nearest + tl.load(p_table + 5)
        b_nearest = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
        for i_tile in range(0, (T + TILE - 1) // TILE):
            p_tile = p_nearest + i_tile * length
            b_nearest = tl.maximum(b_nearest, tl.load(p_tile + o_t, mask=m_t, other=-float("inf")))
        b_nearest = tl.where(m_last, 3.4028234663852886e38, b_nearest)
        i_pick = tl.argmin(tl.where(m_t, b_nearest, float("inf")), 0)

    b_running = tl.full([BLOCK], 0.0 if TOTAL else -float("inf"), dtype=tl.float32)
    b_running = tl.where(m_last, 3.4028234663852886e38, b_running)
    b_running = tl.where(m_t, b_running, float("inf"))
    for i_k in range(0, K):
        tl.store(p_picks + i_k, i_pick.to(tl.int64))
        # The mask ends at a multiple of the alignment, which lets the loads be wide; the padding is not initialised.
        b_row = tl.load(p_gram + i_pick.to(tl.int64) * stride + o_t, mask=o_t < stride, other=0.0)
        b_row = tl.where(m_t, b_row, 0.0)
        b_running = b_running + b_row if TOTAL else tl.maximum(b_running, b_row)
        b_running = tl.where(o_t == i_pick, float("inf"), b_running)
        i_pick = tl.argmin(b_running, 0)


@triton.jit
def _stream_kernel(
    features,
    stride_t,
    stride_d,
    scales,
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
            b_running = tl.load(running + o_t, mask=m_t & (i_k > 0), other=0.0 if TOTAL else -float("inf"))
            b_running = tl.where((b_scale < 0.0) & (i_k == 0), 3.4028234663852886e38, b_running)
            b_running = b_running + b_cosine if TOTAL else tl.maximum(b_running, b_cosine)
            b_running = tl.where(o_t == i_pick, float("inf"), b_running)
            tl.store(running + o_t, b_running, mask=m_t)
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
