"""Greedy MAP of a determinantal point process over tokens, as CDPruner (arXiv 2506.10967) chooses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.cosine_matrix import (
    MATRIX_LIMIT_BYTES,
    ROW_ALIGNMENT,
    cosine_matrices,
    cosine_matrix,
    cosines_to,
    groups_that_fit,
    row_scales,
    unit_rows,
)
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton
from vlmprune.kernels.shared.segments import check_counts, check_offsets, on_device, running_starts

# A token of which less than this share (of its squared length) lies outside what is chosen adds nothing: fp32 knows no
# smaller share.
SPENT = 1e-5

# Tokens and chosen directions a step of the kernel.
STEP_TOKENS, STEP_PICKS = 16, 64


def dpp_map(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    k: Sequence[int] | Tensor,
    *,
    weights: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return `k[s]` tokens of every segment, each adding most to the determinant: local int64 `[sum k]`, pick order.

    The matrix of the process is `weight_i * cosine_ij * weight_j`, in fp32; its Cholesky factor grows by a row a pick
    (Chen et al., arXiv 1709.05135). Ties go to the lowest index and no token is chosen twice. Where the rank runs out,
    tokens that lie in the span of the chosen ones, and those of weight 0, follow by index; the published code divides by
    the rounding error there and repeats tokens. A zero row adds nothing either. A row with NaN or inf, and a token
    whose weight is not finite, is chosen after all others.

    Args:
        features: `[tokens, dim]` fp16, bf16 or fp32, any strides.
        offsets: `[segments + 1]` bounds in `features`; a segment may be empty. A GPU tensor costs one host sync.
        k: picks per segment, each in 0..length. A GPU tensor costs one host sync.
        weights: `[tokens]`, any real dtype (relevance); None for 1 each.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, offset or count.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be two-dimensional [tokens, dim]; got shape {tuple(features.shape)}.")
    if weights is not None and weights.shape != features.shape[:1]:
        raise ValueError(f"weights must be [{features.shape[0]}], one a token; got {tuple(weights.shape)}.")
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    counts = check_counts(k, bounds)
    greedy = dpp_map_triton if chosen == "triton" else dpp_map_reference
    return greedy(features, bounds, counts, weights)


def dpp_map_reference(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    weights: Tensor | None,
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`dpp_map` in plain torch, for arguments that are already checked."""
    picks = [torch.empty(0, dtype=torch.int64, device=features.device)]
    for (begin, end), count in zip(pairwise(bounds), counts, strict=True):
        if count == 0:
            continue
        rows, last = unit_rows(features[begin:end])
        quality = rows.new_ones(end - begin) if weights is None else weights[begin:end].to(torch.float32).square()
        unusable = ~quality.isfinite() if last is None else last | ~quality.isfinite()
        matrix = cosine_matrix(rows, count, limit_bytes)
        share = (rows.square().sum(1) > 0).to(torch.float32)
        picks.append(_greedy(cosines_to(rows, matrix), share, quality, unusable, count))
    return torch.cat(picks)


def _greedy(cosines: Callable[[int], Tensor], share: Tensor, quality: Tensor, last: Tensor, k: int) -> Tensor:
    """Return `k` picks in pick order; `share` is what of each token lies outside the chosen ones, 1 or 0 at first.

    The weights cancel out of the factor's rows: they only scale what a share counts.
    """
    quality = quality.masked_fill(last, 0.0)
    # Added to the scores: nothing for a token to choose from, -1 for one to choose last, -inf for a chosen one.
    penalty = -last.to(torch.float32)
    factor = share.new_empty(k, share.numel())
    picks: list[int] = []
    while len(picks) < k:
        scores = torch.addcmul(penalty, functional.threshold(share, SPENT, 0.0), quality)
        pick = int(scores.argmax())
        if not scores[pick] > 0:
            break
        step = len(picks)
        # Contiguous, or the product takes four times as long.
        shared = factor[:step, pick].contiguous()
        row = torch.addmv(cosines(pick), factor[:step].T, shared, alpha=-1, out=factor[step])
        row /= share[pick].sqrt()
        share.addcmul_(row, row, value=-1)
        penalty[pick] = -torch.inf
        picks.append(pick)
    # What is left adds nothing: by index, those to choose last behind.
    rest = penalty.sort(stable=True, descending=True).indices[: k - len(picks)]
    return torch.cat([torch.tensor(picks, dtype=torch.int64, device=share.device), rest])


def dpp_map_triton(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    weights: Tensor | None,
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`dpp_map` in three launches: row scales, cosines, and the whole loop, the multiprocessors shared out.

    Segments whose matrix would break the limit go through the reference, on the device.
    """
    device = features.device
    starts = running_starts(counts)
    picks = torch.empty(starts[-1], dtype=torch.int64, device=device)
    if starts[-1] == 0:
        return picks
    scales = row_scales(features)
    last = scales < 0
    quality = torch.ones_like(scales) if weights is None else weights.to(torch.float32).square()
    last |= ~quality.isfinite()
    quality.masked_fill_(last, 0.0)
    groups, too_long = groups_that_fit(bounds, counts, limit_bytes)
    for group in groups:
        cosines = cosine_matrices(features, scales, bounds, counts, starts, group)
        lengths = [bounds[segment + 1] - bounds[segment] for segment in group]
        most = max(counts[segment] for segment in group)
        # The barrier needs all programs at once: one a multiprocessor. The interpreter runs them one after the other.
        programs, options = 1, {}
        if device.type == "cuda":
            programs = max(1, torch.cuda.get_device_properties(device).multi_processor_count // len(group))
            options = {"launch_cooperative_grid": programs > 1}
        begins = on_device(running_starts([length * most for length in lengths]), device)
        factor = torch.empty(sum(lengths) * most, dtype=torch.float32, device=device)
        best = torch.full((len(group) * most,), torch.iinfo(torch.int64).min, dtype=torch.int64, device=device)
        arrivals = torch.zeros(len(group), dtype=torch.int32, device=device)
        # 0 for a token to choose from, 1 for one to choose last, 2 for a chosen one.
        taken, share = last.to(torch.int32), (scales > 0).to(torch.float32)
        _dpp_map_kernel[(programs, len(group))](
            *(cosines.values, cosines.table, begins, quality, share, taken, factor, best, arrivals, picks, most, SPENT),
            BLOCK_T=STEP_TOKENS, BLOCK_K=STEP_PICKS, ALIGNMENT=ROW_ALIGNMENT, num_warps=8, **options,
        )  # fmt: skip
    for segment in too_long:
        piece = slice(bounds[segment], bounds[segment + 1])
        weight = None if weights is None else weights[piece]
        picks[starts[segment] : starts[segment + 1]] = dpp_map_reference(
            features[piece], [0, piece.stop - piece.start], [counts[segment]], weight, limit_bytes=limit_bytes
        )
    return picks


@triton.jit
def _dpp_map_kernel(
    values,
    table,
    begins,
    quality,
    share,
    taken,
    factor,
    best,
    arrivals,
    picks,
    MOST,
    spent,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The loop of one segment, its tokens shared out among its programs.

    Each token's row of the factor is written by the program that has the token. They meet in `best[pick]`, an integer
    maximum over (score, lowest index) that does not depend on their order, and at a counter which they only pass when
    all have arrived.
    """
    i_p = tl.program_id(0)
    P = tl.num_programs(0)
    i_s = tl.program_id(1)
    p_table = table + i_s * 6
    i_begin = tl.load(p_table)
    T = tl.load(p_table + 1).to(tl.int32)
    K = tl.load(p_table + 2).to(tl.int32)
    p_picks = picks + tl.load(p_table + 3)
    p_values = values + tl.load(p_table + 4)
    stride = (T + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    p_factor = factor + tl.load(begins + i_s)
    p_best = best + i_s * MOST
    for i_k in range(0, K):
        b_best = tl.full([BLOCK_T], -0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
        for i_t in range(i_p * BLOCK_T, T, P * BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_t = o_t < T
            b_share = tl.load(share + i_begin + o_t, mask=m_t, other=0.0)
            b_score = tl.load(quality + i_begin + o_t, mask=m_t, other=0.0) * b_share
            b_score = tl.where(b_share > spent, b_score, 0.0)
            b_taken = tl.load(taken + i_begin + o_t, mask=m_t, other=2)
            b_score = tl.where(b_taken == 1, -1.0, b_score)
            b_score = tl.where(b_score == 0.0, 0.0, b_score)
            b_bits = b_score.to(tl.int32, bitcast=True)
            b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
            b_key = b_key | (0x7FFFFFFF - o_t.to(tl.int64))
            b_best = tl.maximum(b_best, tl.where(b_taken == 2, -0x7FFFFFFFFFFFFFFF, b_key))
        tl.atomic_max(p_best + i_k, tl.max(b_best, 0), sem="release")
        tl.debug_barrier()
        tl.atomic_add(arrivals + i_s, 1, sem="acq_rel")
        while tl.atomic_add(arrivals + i_s, 0, sem="acquire") < (i_k + 1) * P:
            pass
        tl.debug_barrier()
        chosen = tl.load(p_best + i_k, volatile=True)
        i_pick = 0x7FFFFFFF - (chosen & 0x7FFFFFFF)
        if i_p == 0:
            tl.store(p_picks + i_k, i_pick)
        if (i_pick // BLOCK_T) % P == i_p:
            tl.store(taken + i_begin + i_pick, 2)
        # A score above 0 has a key above 0. Others add nothing: the factor gets a row of zeros.
        adds = (chosen >> 32) > 0
        scale = tl.where(adds, 1.0 / tl.sqrt_rn(tl.load(share + i_begin + i_pick, volatile=True)), 0.0)
        p_pick = p_factor + i_pick * MOST
        for i_t in range(i_p * BLOCK_T, T, P * BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_t = o_t < T
            p_row = p_factor + o_t.to(tl.int64) * MOST
            b_dot = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
            for i_j in range(0, i_k, BLOCK_K):
                o_j = i_j + tl.arange(0, BLOCK_K)
                m_j = o_j < i_k
                # Written by another program: past the first-level cache.
                b_pick = tl.load(p_pick + o_j, mask=m_j, other=0.0, cache_modifier=".cg")
                b_row = tl.load(p_row[:, None] + o_j[None, :], mask=m_t[:, None] & m_j[None, :], other=0.0)
                b_dot += b_row * b_pick[None, :]  # [BLOCK_T, BLOCK_K]
            b_cosine = tl.load(p_values + i_pick * stride + o_t, mask=m_t, other=0.0)
            b_new = tl.where(adds, (b_cosine - tl.sum(b_dot, 1)) * scale, 0.0)
            tl.store(p_row + i_k, b_new, mask=m_t)
            # The chosen token's own share stays: other programs may still have to read it.
            m_other = m_t & (o_t != i_pick)
            b_share = tl.load(share + i_begin + o_t, mask=m_other, other=0.0)
            tl.store(share + i_begin + o_t, b_share - b_new * b_new, mask=m_other)
        tl.debug_barrier()


COMPILE_CASES = (
    CompileCase(
        "2880",
        dpp_map_triton,
        (Like(torch.bfloat16, (2880, 1024)), [0, 2880], [320], Like(torch.float32, (2880,))),
    ),
)
