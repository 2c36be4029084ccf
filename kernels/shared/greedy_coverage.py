"""The greedy loop of `coverage` and `coverage_from_values`: take what covers the most that is not covered yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmprune.kernels.shared.cosine_matrix import LAST, ROW_ALIGNMENT
from vlmprune.kernels.shared.implementation import tl, triton

COMBINATIONS = ("multiply", "add")

# Candidates whose gain is computed again at a time, at first.
FIRST_CANDIDATES = 16
# Of so few tokens all gains cost little more than those of a quarter.
FEW_TOKENS = 1024

# Tokens and rows a step of the kernel.
STEP_TOKENS, STEP_ROWS = 4, 512


def check_combination(weights: Tensor | None, combine: str, tokens: int) -> None:
    """Raise ValueError for weights that are not one a token, or an unknown combination."""
    if weights is not None and weights.shape != (tokens,):
        raise ValueError(f"weights must be [{tokens}], one a token; got {tuple(weights.shape)}.")
    if combine not in COMBINATIONS:
        raise ValueError(f"combine={combine!r} is not one of {', '.join(COMBINATIONS)}.")


def greedy_coverage(
    values_of: Callable[[Tensor | slice], Tensor],
    gains: Tensor,
    k: int,
    weight: Tensor | None,
    combine: str,
    last: Tensor | None,
) -> Tensor:
    """Return `k` picks in pick order, int64 `[k]`.

    A gain never grows, so an old one is a bound: at each step only candidates whose bound is above the best new gain
    are computed again, and the pick is the one that computing all of them would give.

    Args:
        values_of: gives the values `[some, rows]`, 0 or more count, of the tokens of an index.
        gains: fp32 `[tokens]`, the gains while nothing is covered; written.
        k: number of picks.
        weight: fp32 `[tokens]`.
        combine: how weight and gain are combined.
        last: bool `[tokens]`, tokens to choose after all others.
    """
    # A token without a finite score is like one to choose last.
    scores = _scored(gains, weight, combine)
    unusable = ~scores.isfinite() if last is None else last | ~scores.isfinite()
    scores.masked_fill_(unusable, -LAST)
    closed = unusable.clone()
    proper = unusable.numel() - int(unusable.sum())
    picks: list[int] = []
    cover = scores.new_zeros(())
    candidates = FIRST_CANDIDATES
    for step in range(min(k, proper)):
        fresh: set[int] = set()
        rounds = 0
        while (pick := int(scores.argmax())) not in fresh and step:
            if len(scores) <= FEW_TOKENS and 4 * candidates >= proper - step:
                every = _scored((values_of(slice(None)) - cover).clamp_(min=0).sum(1), weight, combine)
                scores = torch.where(closed, scores, every)
                pick = int(scores.argmax())
                break
            # The highest are proper tokens that were not chosen: there are as many.
            some = scores.topk(min(candidates, proper - step)).indices
            new = (values_of(some) - cover).clamp_(min=0).sum(1)
            scores[some] = _scored(new, None if weight is None else weight[some], combine)
            fresh.update(some.tolist())
            candidates, rounds = 2 * candidates, rounds + 1
        # The next step mostly needs as many as this one, or fewer.
        candidates = max(FIRST_CANDIDATES, candidates // (4 if rounds == 1 else 2))
        picks.append(pick)
        scores[pick] = -torch.inf
        closed[pick] = True
        cover = torch.maximum(cover, values_of(slice(pick, pick + 1))[0])
    chosen = torch.tensor(picks, dtype=torch.int64, device=scores.device)
    return torch.cat([chosen, unusable.nonzero().flatten()[: k - len(picks)]])


def _scored(gains: Tensor, weight: Tensor | None, combine: str) -> Tensor:
    if weight is None:
        return gains
    return gains * weight if combine == "multiply" else gains + weight


def launch_coverage(
    values: Tensor,
    table: Tensor,
    segments: int,
    rows: int,
    stride: int,
    most_rows: int,
    most_picks: int,
    weights: Tensor | None,
    combine: str,
    last: Tensor,
    picks: Tensor,
) -> None:
    """Write the picks of some segments: one cooperative launch, the multiprocessors shared out among the segments.

    Args:
        values: fp32, what each token covers, a matrix `[tokens, rows]` a segment.
        table: int64, six numbers a segment, as in `CosineMatrices`.
        segments: number of segments in the table.
        rows: rows that each segment has to cover; 0 for as many as it has tokens, with the row stride of cosine matrices.
        stride: from one token's values to the next where `rows` is given.
        most_rows: of any segment.
        most_picks: of any segment.
        weights: `[all tokens]`, or None.
        combine: how weights and gains are combined.
        last: bool `[all tokens]`, tokens to choose after all others.
        picks: int64, written.
    """
    device = values.device
    # The barrier needs all programs at once: one a multiprocessor. The interpreter runs them one after the other.
    programs, options = 1, {}
    if device.type == "cuda":
        programs = max(1, torch.cuda.get_device_properties(device).multi_processor_count // segments)
        options = {"launch_cooperative_grid": programs > 1}
    cover = torch.empty(segments * programs * most_rows, dtype=torch.float32, device=device)
    best = torch.full((segments * most_picks,), torch.iinfo(torch.int64).min, dtype=torch.int64, device=device)
    arrivals = torch.zeros(segments, dtype=torch.int32, device=device)
    # 0 for a token to choose from, 1 for one to choose last, 2 for a chosen one.
    taken = last.to(torch.int32)
    _coverage_kernel[(programs, segments)](
        *(values, taken if weights is None else weights, taken, table, cover, best, arrivals, picks),
        *(rows, stride, most_rows, most_picks),
        BLOCK_T=STEP_TOKENS, BLOCK_R=STEP_ROWS, ALIGNMENT=ROW_ALIGNMENT, WEIGHTED=weights is not None,
        ADD=combine == "add", num_warps=8, **options,
    )  # fmt: skip


@triton.jit
def _coverage_kernel(
    values,
    weights,
    taken,
    table,
    cover,
    best,
    arrivals,
    picks,
    R,
    stride,
    MOST_ROWS,
    MOST_PICKS,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
):
    """All gains again at every pick, the tokens of a segment shared out among its programs.

    Each program keeps its own copy of what is covered. They meet in `best[pick]`, an integer maximum over (score, lowest
    index) that does not depend on their order, and at a counter which they only pass when all have arrived.
    """
    i_p = tl.program_id(0)
    P = tl.num_programs(0)
    i_s = tl.program_id(1).to(tl.int64)
    p_table = table + i_s * 6
    i_begin = tl.load(p_table)
    T = tl.load(p_table + 1).to(tl.int32)
    K = tl.load(p_table + 2).to(tl.int32)
    p_picks = picks + tl.load(p_table + 3)
    p_values = values + tl.load(p_table + 4)
    p_cover = cover + (i_s * P + i_p) * MOST_ROWS
    p_best = best + i_s * MOST_PICKS
    p_taken = taken + i_begin
    rows = R
    if R == 0:
        rows = T
        stride = (T + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    for i_k in range(0, K):
        b_best = tl.full([BLOCK_T], -0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
        for i_t in range(i_p * BLOCK_T, T, P * BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            m_t = o_t < T
            b_sum = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
            for i_r in range(0, rows, BLOCK_R):
                o_r = i_r + tl.arange(0, BLOCK_R)
                m_r = o_r < rows
                b_cover = tl.load(p_cover + o_r, mask=m_r & (i_k > 0), other=0.0)
                p_value = p_values + o_t.to(tl.int64)[:, None] * stride + o_r[None, :]
                b_value = tl.load(p_value, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BLOCK_T, BLOCK_R]
                b_sum += tl.maximum(b_value - b_cover[None, :], 0.0)
            b_score = tl.sum(b_sum, 1)
            if WEIGHTED:
                b_weight = tl.load(weights + i_begin + o_t, mask=m_t, other=0.0).to(tl.float32)
                b_score = b_score + b_weight if ADD else b_score * b_weight
            b_taken = tl.load(p_taken + o_t, mask=m_t, other=2)
            b_score = tl.where(b_taken == 1, -3.4028234663852886e38, b_score)
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
        i_pick = 0x7FFFFFFF - (tl.load(p_best + i_k, volatile=True) & 0x7FFFFFFF)
        if i_p == 0:
            tl.store(p_picks + i_k, i_pick)
        for i_r in range(0, rows, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < rows
            b_cover = tl.load(p_cover + o_r, mask=m_r & (i_k > 0), other=0.0)
            b_value = tl.load(p_values + i_pick * stride + o_r, mask=m_r, other=0.0)
            tl.store(p_cover + o_r, tl.maximum(b_cover, b_value), mask=m_r)
        tl.debug_barrier()
        # Only the program that has the token to itself reads this again.
        if (i_pick // BLOCK_T) % P == i_p:
            tl.store(p_taken + i_pick, 2)
        tl.debug_barrier()
