"""How much of a density peak every token of a ragged segment is (DPC-kNN)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton
from vlmprune.kernels.shared.segments import check_counts, check_offsets, on_device
from vlmprune.kernels.shared.squared_distances import padded_segments, segment_blocks, symmetric_squared_distances

_TILE = 16


def peak_scores(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    neighbours: Sequence[int] | Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Return the score of every token as a centre of its segment, fp32 `[tokens]`.

    A token's density is `exp(-mean(d ** 2))` over its `neighbours` nearest tokens, itself included, `d` the Euclidean distance
    over the root of the width. Its score is the density times the distance to the nearest denser token, or to the farthest
    pair of its segment's tokens where none is denser. Of equally dense tokens the one with the lower index is denser. No
    more than the distances within some segments is held at a time by the reference, those within all by the kernel.

    Args:
        features: `[tokens, dim]` floating point, any strides.
        offsets: `[segments + 1]` bounds; a segment may be empty. A GPU tensor costs one host sync.
        neighbours: per segment, 0 (an empty one) to its length.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, offset or count; a segment with tokens and no neighbours.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point [tokens, dim]; got {features.dtype} {tuple(features.shape)}."
        )
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    nearest = check_counts(neighbours, bounds)
    for segment, ((begin, end), count) in enumerate(zip(pairwise(bounds), nearest, strict=True)):
        if end > begin and count == 0:
            raise ValueError(f"neighbours[{segment}] = 0, but segment {segment} has {end - begin} tokens.")
    if chosen == "triton":
        return _peak_scores_triton(features, bounds, nearest)
    return peak_scores_reference(features, bounds, nearest)


def peak_scores_reference(features: Tensor, bounds: Sequence[int], neighbours: Sequence[int]) -> Tensor:
    """`peak_scores` in plain torch, for offsets and counts that are already checked Python ints."""
    scores = [features.new_zeros(0, dtype=torch.float32)]
    for block in segment_blocks(bounds, features.shape[1]):
        values, inside = padded_segments(features, bounds, block)
        if not values.shape[1]:
            continue
        both = inside[:, :, None] & inside[:, None, :]
        squares = symmetric_squared_distances(values) / values.shape[2]
        # Padding is farther than everything, and densest of nothing.
        squares = squares.masked_fill(~both, torch.inf)
        counts = torch.tensor([neighbours[segment] for segment in block], device=values.device).clamp(min=1)
        sums = squares.topk(int(counts.max()), dim=2, largest=False).values.cumsum(2)
        last = (counts - 1)[:, None, None].expand(-1, sums.shape[1], 1)
        density = (-sums.gather(2, last)[..., 0] / counts[:, None]).exp()
        earlier = torch.ones_like(both[0]).tril(-1)
        denser = (density[:, None] > density[..., None]) | ((density[:, None] == density[..., None]) & earlier)
        farthest = squares.masked_fill(~both, 0.0).amax((1, 2))[:, None]
        apart = squares.masked_fill(~(denser & both), torch.inf).amin(2)
        scores.append((torch.where(apart.isinf(), farthest, apart).sqrt() * density)[inside])
    return torch.cat(scores)


def _peak_scores_triton(features: Tensor, bounds: Sequence[int], neighbours: Sequence[int]) -> Tensor:
    tokens, dim = features.shape
    device = features.device
    scores = torch.empty(tokens, dtype=torch.float32, device=device)
    lengths = [end - begin for begin, end in pairwise(bounds)]
    longest = max(lengths, default=0)
    if not tokens:
        return scores
    places = [0]
    for length in lengths:
        places.append(places[-1] + length * length)
    table = on_device([*bounds, *neighbours, *places], device)
    starts, counts, matrices = table.split([len(bounds), len(neighbours), len(places)])
    squares = torch.empty(places[-1], dtype=torch.float32, device=device)
    density = torch.empty(tokens, dtype=torch.float32, device=device)
    farthest = torch.empty(tokens, dtype=torch.float32, device=device)
    tiles = triton.cdiv(longest, _TILE)
    block = max(16, triton.next_power_of_2(longest))
    warps = min(8, max(1, block // 256))
    _distance_kernel[(len(lengths), tiles, tiles)](
        features, *features.stride(), starts, matrices, squares, dim,
        TILE=_TILE, BLOCK_D=min(32, max(16, triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    grid = (len(lengths), longest)
    _density_kernel[grid](starts, counts, matrices, squares, density, farthest, BLOCK=block, num_warps=warps)
    _score_kernel[grid](starts, matrices, squares, density, farthest, scores, BLOCK=block, num_warps=warps)
    return scores


@triton.jit
def _distance_kernel(
    features, stride_t, stride_d, starts, matrices, squares, D, TILE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One tile of a segment's squared distances over the width, by differences: the same for both directions."""
    i_s = tl.program_id(0)
    i_begin = tl.load(starts + i_s)
    T = (tl.load(starts + i_s + 1) - i_begin).to(tl.int32)
    o_m = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o_n = tl.program_id(2) * TILE + tl.arange(0, TILE)
    m_m, m_n = o_m < T, o_n < T
    if (tl.program_id(1) * TILE < T) & (tl.program_id(2) * TILE < T):
        b_sum = tl.zeros([TILE, TILE], dtype=tl.float32)
        p_m = features + (i_begin + o_m.to(tl.int64)) * stride_t
        p_n = features + (i_begin + o_n.to(tl.int64)) * stride_t
        for i_d in range(0, D, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            o_f = o_d.to(tl.int64) * stride_d
            b_m = tl.load(p_m[:, None] + o_f[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_n = tl.load(p_n[:, None] + o_f[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_gap = b_m[:, None, :] - b_n[None, :, :]  # [TILE, TILE, BLOCK_D]
            b_sum += tl.sum(b_gap * b_gap, 2)
        p_out = squares + tl.load(matrices + i_s) + o_m.to(tl.int64)[:, None] * T + o_n[None, :]
        tl.store(p_out, b_sum / D, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _density_kernel(starts, counts, matrices, squares, density, farthest, BLOCK: tl.constexpr):
    """Density of one token, and its largest squared distance."""
    i_s, i_t = tl.program_id(0), tl.program_id(1)
    i_begin = tl.load(starts + i_s)
    T = (tl.load(starts + i_s + 1) - i_begin).to(tl.int32)
    if i_t < T:
        K = tl.load(counts + i_s).to(tl.int32)
        o_t = tl.arange(0, BLOCK)
        m_t = o_t < T
        p_row = squares + tl.load(matrices + i_s) + i_t.to(tl.int64) * T
        b_row = tl.load(p_row + o_t, mask=m_t, other=0.0)
        tl.store(farthest + i_begin + i_t, tl.max(b_row, 0))
        b_row = tl.where(m_t, b_row, float("inf"))
        total = tl.zeros([], dtype=tl.float32)
        for _ in range(0, K):
            nearest = tl.argmin(b_row, 0)
            total += tl.min(b_row, 0)
            b_row = tl.where(o_t == nearest, float("inf"), b_row)
        tl.store(density + i_begin + i_t, tl.exp(-total / K))


@triton.jit
def _score_kernel(starts, matrices, squares, density, farthest, scores, BLOCK: tl.constexpr):
    """Score of one token."""
    i_s, i_t = tl.program_id(0), tl.program_id(1)
    i_begin = tl.load(starts + i_s)
    T = (tl.load(starts + i_s + 1) - i_begin).to(tl.int32)
    if i_t < T:
        o_t = tl.arange(0, BLOCK)
        m_t = o_t < T
        p_row = squares + tl.load(matrices + i_s) + i_t.to(tl.int64) * T
        b_row = tl.load(p_row + o_t, mask=m_t, other=0.0)
        b_density = tl.load(density + i_begin + o_t, mask=m_t, other=-1.0)
        own = tl.load(density + i_begin + i_t)
        m_denser = m_t & ((b_density > own) | ((b_density == own) & (o_t < i_t)))
        apart = tl.min(tl.where(m_denser, b_row, float("inf")), 0)
        widest = tl.max(tl.load(farthest + i_begin + o_t, mask=m_t, other=0.0), 0)
        apart = tl.where(apart < float("inf"), apart, widest)
        tl.store(scores + i_begin + i_t, tl.sqrt(apart) * own)


COMPILE_CASES = tuple(
    CompileCase(f"{dtype} 8 x {tokens}", _peak_scores_triton,
        (Like(dtype, (8 * tokens, 2048)), list(range(0, 8 * tokens + 1, tokens)), [7] * 8))
    for dtype, tokens in ((torch.float32, 196), (torch.bfloat16, 576))
)  # fmt: skip
