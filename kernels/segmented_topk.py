"""The k highest scores of each ragged segment, in one launch, with a defined order for ties, NaN and infinities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton
from vlmprune.kernels.shared.segments import check_counts, check_offsets, on_device, running_starts

ORDERS = ("position", "score")
RANK_BLOCK = 64


def segmented_topk(
    scores: Tensor,
    offsets: Sequence[int] | Tensor,
    k: Sequence[int] | Tensor,
    *,
    order: str = "position",
    total: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return the indices of the `k[s]` highest scores of every segment `s`, local to the segment, int64 `[sum k]`.

    Scores are compared in fp32: +inf first, -inf after all other numbers, NaN last; equal scores (0.0 and -0.0 are
    equal) go to the lowest index.

    Args:
        scores: `[tokens]`, any real dtype, any stride.
        offsets: `[segments + 1]` bounds in `scores`; a segment may be empty.
        k: picks per segment, each in 0..length. A tensor on the GPU needs `total`; it is then not checked, and the
            surplus slots of a count above its segment's length hold -1.
        order: "position" (ascending indices) or "score" (highest first).
        total: `sum(k)` where `k` is a tensor, so that the host need not wait for the GPU to size the output.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, order, offset or count.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if scores.dim() != 1:
        raise ValueError(f"scores must be one-dimensional [tokens]; got shape {tuple(scores.shape)}.")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {', '.join(ORDERS)}.")
    if choose_implementation(scores.device, implementation) == "triton":
        return _segmented_topk_triton(scores, offsets, k, order, total)
    bounds = check_offsets(offsets, scores.numel())
    return segmented_topk_reference(scores, bounds, check_counts(k, bounds), order=order)


def segmented_topk_reference(scores: Tensor, bounds: Sequence[int], counts: Sequence[int], *, order: str) -> Tensor:
    """`segmented_topk` in plain torch, for offsets and counts that are already checked Python ints."""
    values = scores.to(torch.float32)
    if len(counts) == 1:
        return _segment_topk(values, counts[0], order == "score")
    picks = [
        _segment_topk(values[begin:end], count, order == "score")
        for (begin, end), count in zip(pairwise(bounds), counts, strict=True)
    ]
    return torch.cat(picks) if picks else torch.empty(0, dtype=torch.int64, device=scores.device)


def _segment_topk(values: Tensor, count: int, by_score: bool) -> Tensor:
    length = values.shape[0]
    if count == 0 or (count == length and not by_score):
        return torch.arange(count, device=values.device)
    found, indices = values.topk(min(count + 1, length))
    # Without ties that matter torch's top-k is the answer. It takes NaN for the highest, so a NaN would come first.
    if not math.isnan(found[0]):
        if by_score:
            if bool((found[1:] < found[:-1]).all()):
                return indices[:count]
        else:
            last, following = found[-2:].tolist()
            if last > following:
                return indices[:count].sort().values
    # With the index in the low half no two keys are equal, so top-k has no ties left to break.
    keys = (ordered_keys(values).to(torch.int64) << 32) - torch.arange(length, device=values.device)
    picks = -keys.topk(count).values & 0xFFFFFFFF
    return picks if by_score else picks.sort().values


def ordered_keys(scores: Tensor) -> Tensor:
    """Return int32 keys in the order of the fp32 scores: NaN lowest, then -inf, with 0.0 equal to -0.0."""
    values = scores.to(torch.float32) + 0.0
    bits = values.contiguous().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return keys.masked_fill_(values.isnan(), -0x7FFFFFFF)


def _segmented_topk_triton(
    scores: Tensor, offsets: Sequence[int] | Tensor, k: Sequence[int] | Tensor, order: str, total: int | None
) -> Tensor:
    device = scores.device
    if isinstance(offsets, Tensor) and isinstance(k, Tensor) and total is not None:
        starts, lengths = offsets.to(device), k.to(device)
        begins = lengths.cumsum(0) - lengths
        longest, most = scores.numel(), total
    else:
        bounds = check_offsets(offsets, scores.numel())
        counts = check_counts(k, bounds)
        outputs = running_starts(counts)
        total = outputs[-1]
        longest = max((end - begin for begin, end in pairwise(bounds)), default=0)
        most = max(counts, default=0)
        table = on_device(bounds + counts + outputs, device)
        starts, lengths, begins = table.split([len(bounds), len(counts), len(outputs)])
    segments = lengths.numel()
    picks = torch.empty(total, dtype=torch.int64, device=device)
    if total == 0:
        return picks
    block = min(4096, max(256, triton.next_power_of_2(longest)))
    _select_kernel[(segments,)](
        scores, scores.stride(0), starts, lengths, begins, picks, BLOCK=block, num_warps=max(4, block // 512)
    )
    if order == "position":
        return picks
    ranked = torch.empty_like(picks)
    grid = (segments, triton.cdiv(most, RANK_BLOCK))
    _rank_kernel[grid](scores, scores.stride(0), starts, lengths, begins, picks, ranked, BLOCK=RANK_BLOCK, num_warps=4)
    return ranked


@triton.jit
def _ordered(b_scores):
    b_values = b_scores.to(tl.float32)
    b_values = tl.where(b_values == 0.0, 0.0, b_values)
    b_bits = b_values.to(tl.int32, bitcast=True)
    b_keys = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return tl.where(b_values == b_values, b_keys, -0x7FFFFFFF)


@triton.jit
def _select_kernel(scores, stride, offsets, counts, starts, picks, BLOCK: tl.constexpr):
    """Radix selection, eight bits a pass, one program a segment; the last pass writes the picks in index order."""
    i_s = tl.program_id(0)
    i_begin = tl.load(offsets + i_s)
    T = (tl.load(offsets + i_s + 1) - i_begin).to(tl.int32)
    wanted = tl.load(counts + i_s).to(tl.int32)
    K = tl.minimum(wanted, T)
    p_scores = scores + i_begin * stride
    p_picks = picks + tl.load(starts + i_s)
    o_t = tl.arange(0, BLOCK)
    o_bin = tl.arange(0, 256)

    if K > 0:
        # Keys as unsigned numbers: the high bits found so far, and how many picks lie among the keys that share them.
        prefix = tl.zeros([], dtype=tl.uint32)
        missing = K
        for i_pass in tl.static_range(4):
            shift = 24 - 8 * i_pass
            b_count = tl.zeros([256], dtype=tl.int32)
            for i_t in range(0, T, BLOCK):
                m_t = i_t + o_t < T
                b_scores = tl.load(p_scores + (i_t + o_t).to(tl.int64) * stride, mask=m_t, other=0.0)
                b_keys = _ordered(b_scores).to(tl.uint32, bitcast=True) ^ 0x80000000
                if i_pass > 0:
                    m_t = m_t & ((b_keys >> (shift + 8)) == prefix)
                b_digit = ((b_keys >> shift) & 0xFF).to(tl.int32)
                b_count += tl.histogram(b_digit, 256, mask=m_t)
            b_above = tl.cumsum(b_count, 0, reverse=True) - b_count
            m_bin = (b_above < missing) & (b_above + b_count >= missing)
            digit = tl.sum(tl.where(m_bin, o_bin, 0))
            missing -= tl.sum(tl.where(m_bin, b_above, 0))
            prefix = (prefix << 8) | digit.to(tl.uint32)

        taken = 0
        equal = 0
        for i_t in range(0, T, BLOCK):
            m_t = i_t + o_t < T
            b_scores = tl.load(p_scores + (i_t + o_t).to(tl.int64) * stride, mask=m_t, other=0.0)
            b_keys = _ordered(b_scores).to(tl.uint32, bitcast=True) ^ 0x80000000
            b_equal = (m_t & (b_keys == prefix)).to(tl.int32)
            b_rank = equal + tl.cumsum(b_equal, 0)
            b_take = (m_t & ((b_keys > prefix) | ((b_equal > 0) & (b_rank <= missing)))).to(tl.int32)
            b_slot = taken + tl.cumsum(b_take, 0) - 1
            tl.store(p_picks + b_slot, (i_t + o_t).to(tl.int64), mask=b_take > 0)
            equal += tl.sum(b_equal)
            taken += tl.sum(b_take)

    for i_t in range(K, wanted, BLOCK):
        tl.store(p_picks + i_t + o_t, tl.full([BLOCK], -1, dtype=tl.int64), mask=i_t + o_t < wanted)


@triton.jit
def _rank_kernel(scores, stride, offsets, counts, starts, picks, ranked, BLOCK: tl.constexpr):
    """Order the picks of each segment by score: a pick's place is the number of picks before it, by counting."""
    i_s = tl.program_id(0)
    i_begin = tl.load(offsets + i_s)
    T = (tl.load(offsets + i_s + 1) - i_begin).to(tl.int32)
    wanted = tl.load(counts + i_s).to(tl.int32)
    K = tl.minimum(wanted, T)
    p_scores = scores + i_begin * stride
    i_start = tl.load(starts + i_s)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)

    if tl.program_id(1) * BLOCK < wanted:
        m_k = o_k < K
        b_pick = tl.load(picks + i_start + o_k, mask=m_k, other=0)
        b_keys = _ordered(tl.load(p_scores + b_pick * stride, mask=m_k, other=0.0))
        b_place = tl.zeros([BLOCK], dtype=tl.int32)
        for i_j in range(0, K, BLOCK):
            o_j = i_j + tl.arange(0, BLOCK)
            m_j = o_j < K
            b_other = tl.load(picks + i_start + o_j, mask=m_j, other=0)
            b_others = _ordered(tl.load(p_scores + b_other * stride, mask=m_j, other=0.0))
            # [BLOCK, BLOCK]; picks come in index order, so the earlier slot wins a tie
            m_before = (b_others[None, :] > b_keys[:, None]) | (
                (b_others[None, :] == b_keys[:, None]) & (o_j[None, :] < o_k[:, None])
            )
            b_place += tl.sum((m_before & m_j[None, :]).to(tl.int32), 1)
        tl.store(ranked + i_start + b_place, b_pick, mask=m_k)
        tl.store(ranked + i_start + o_k, tl.full([BLOCK], -1, dtype=tl.int64), mask=(o_k >= K) & (o_k < wanted))


COMPILE_CASES = tuple(
    CompileCase(f"{dtype} {tokens}", _segmented_topk_triton, (Like(dtype, (tokens,)), [0, tokens], [64], "score", None))
    for dtype, tokens in ((torch.float32, 576), (torch.bfloat16, 32768))
)
