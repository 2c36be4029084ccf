"""Best partner of every source token among the destinations, the match of ToMe (arXiv 2210.09461) and its successors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.cosine_matrix import row_scales, unit_rows
from vlmprune.kernels.shared.implementation import choose_implementation, dot_needs_fp32, tl, triton
from vlmprune.kernels.shared.segments import check_offsets, on_device

# Elements of the similarity matrix that the reference holds at a time, so that they are still in the cache when they are read:
# along rows, and down columns.
BLOCK_ELEMENTS = 2**21
CACHED_ELEMENTS = 2**17

# Side of the tiles, and how many destinations one program looks at.
TILE, SPAN = 64, 512


def bipartite_match(
    sources: Tensor,
    destinations: Tensor,
    source_offsets: Sequence[int] | Tensor,
    destination_offsets: Sequence[int] | Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the most similar destination of every source and their cosine, without the whole matrix.

    Only rows of one segment are compared. Equal cosines go to the lowest index. A zero row has cosine 0 to everything; a
    pair with a row that holds NaN or inf has -inf, and so has a source whose segment has no destination.

    Args:
        sources: `[sources, dim]` floating point, any strides.
        destinations: `[destinations, dim]`.
        source_offsets: `[segments + 1]` bounds in `sources`; a segment may be empty. A GPU tensor costs one host sync.
        destination_offsets: `[segments + 1]` bounds in `destinations`, likewise.
        implementation: forced "torch" or "triton"; None goes by the device.

    Returns:
        The partners, int64 `[sources]`, local to the segment (0 where there is none), and the cosines, fp32 `[sources]`.

    Raises:
        ValueError: a bad shape or offset.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if sources.dim() != 2 or destinations.dim() != 2 or sources.shape[1] != destinations.shape[1]:
        raise ValueError(
            "sources and destinations must be [tokens, dim] with the same dim; "
            f"got {tuple(sources.shape)} and {tuple(destinations.shape)}."
        )
    chosen = choose_implementation(sources.device, implementation)
    bounds = check_offsets(source_offsets, sources.shape[0], "source_offsets")
    ends = check_offsets(destination_offsets, destinations.shape[0], "destination_offsets")
    if len(bounds) != len(ends):
        raise ValueError(
            "source_offsets and destination_offsets must have the same number of segments; "
            f"got {len(bounds) - 1} and {len(ends) - 1}."
        )
    match = bipartite_match_triton if chosen == "triton" else bipartite_match_reference
    return match(sources, destinations, bounds, ends)


def bipartite_match_reference(
    sources: Tensor, destinations: Tensor, bounds: Sequence[int], ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`bipartite_match` in plain torch, for arguments that are already checked."""
    # The best of a row does not depend on its length: only its score is divided by it.
    rows = sources.to(torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=1)
    pairs = list(zip(pairwise(bounds), pairwise(ends), strict=True))
    if len(rows) and all(first < last for (begin, end), (first, last) in pairs if begin < end):
        units = destinations.to(torch.float32)
        lengths = torch.linalg.vector_norm(units, dim=1, keepdim=True)
        if _proper(norms) and _proper(lengths):
            partners, scores = _best_of_proper(rows, units / lengths, pairs)
            return partners, scores.div_(norms)
    columns, hidden = unit_rows(destinations)
    best = []
    for (begin, end), (first, last) in pairs:
        block = max(1, BLOCK_ELEMENTS // max(1, last - first))
        for start in range(begin, end, block):
            part = rows[start : min(start + block, end)]
            if first == last:
                best.append((part.new_full(part.shape[:1], -torch.inf), norms.new_zeros(len(part), dtype=torch.int64)))
                continue
            products = part @ columns[first:last].T
            if hidden is not None:
                products.masked_fill_(hidden[first:last], -torch.inf)
            best.append(products.max(1))
    if len(best) == 1:
        scores, partners = best[0]
    else:
        scores = torch.cat([part[0] for part in best]) if best else norms
        partners = torch.cat([part[1] for part in best]) if best else norms.to(torch.int64)
    broken = ~norms.isfinite()
    scores = scores.div_(norms.masked_fill_(norms == 0, 1.0)).masked_fill_(broken, -torch.inf)
    return partners.masked_fill_(broken, 0), scores


def _best_of_proper(
    rows: Tensor, units: Tensor, pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> tuple[Tensor, Tensor]:
    """Best unit row of every row and their product, where no row needs to be masked.

    While the products are in the cache, a maximum down the columns is faster than one along the rows.
    """
    best = []
    for (begin, end), (first, last) in pairs:
        part, columns = rows[begin:end], units[first:last]
        if 0 < len(part) * len(columns) <= CACHED_ELEMENTS:
            best.append((columns @ part.T).max(0))
        elif len(part):
            best.extend((some @ columns.T).max(1) for some in part.split(max(1, BLOCK_ELEMENTS // len(columns))))
    if len(best) == 1:
        return best[0].indices, best[0].values
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])


def _proper(norms: Tensor) -> bool:
    """Whether no row is zero and none has NaN or inf, so that nothing must be masked."""
    low, high = norms.aminmax()
    return float(low) > 0 and float(high) < math.inf


def bipartite_match_triton(
    sources: Tensor, destinations: Tensor, bounds: Sequence[int], ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`bipartite_match` by tiles: programs share out the destinations of a tile, and their best ones meet in one maximum."""
    device = sources.device
    tokens, dim = sources.shape
    longest, most = (max((end - begin for begin, end in pairwise(limits)), default=0) for limits in (bounds, ends))
    if tokens == 0 or most == 0:
        return (
            torch.zeros(tokens, dtype=torch.int64, device=device),
            torch.full((tokens,), -torch.inf, dtype=torch.float32, device=device),
        )
    spans = triton.cdiv(most, SPAN)
    # The cosine's bits, in the order of the numbers, above the destination counted downwards: the highest key is the
    # best partner, the lowest index among equals, whatever the order of the programs.
    keys = torch.empty(spans, tokens, dtype=torch.int64, device=device)
    table = on_device([*bounds, *ends], device)
    # Products without tensor cores hold their operands in registers.
    upcast = dot_needs_fp32(sources, destinations)
    warps = 8 if upcast or sources.dtype == torch.float32 else 4
    block_dim = min(128 // sources.element_size(), max(16, triton.next_power_of_2(dim)))
    _match_kernel[(triton.cdiv(longest, TILE), spans, len(bounds) - 1)](
        *(sources, *sources.stride(), destinations, *destinations.stride()),
        *(row_scales(sources), row_scales(destinations), table, keys, len(bounds), tokens, dim),
        TILE=TILE, SPAN=SPAN, BLOCK_D=block_dim, UPCAST=upcast, num_warps=warps, num_stages=3,
    )  # fmt: skip
    best = keys.amax(0)
    partners = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    bits = (best >> 32).to(torch.int32)
    return partners, (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


@triton.jit
def _match_kernel(
    sources,
    stride_st,
    stride_sd,
    destinations,
    stride_dt,
    stride_dd,
    source_scales,
    destination_scales,
    table,
    keys,
    BOUNDS,
    S,
    D,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Best destination of one tile of sources within one span of the destinations."""
    i_g = tl.program_id(2)
    i_span = tl.program_id(1)
    i_begin = tl.load(table + i_g)
    T = (tl.load(table + i_g + 1) - i_begin).to(tl.int32)
    i_first = tl.load(table + BOUNDS + i_g)
    N = (tl.load(table + BOUNDS + i_g + 1) - i_first).to(tl.int32)
    if tl.program_id(0) * TILE < T:
        o_s = tl.program_id(0) * TILE + tl.arange(0, TILE)
        m_s = o_s < T
        b_scale_s = tl.load(source_scales + i_begin + o_s, mask=m_s, other=0.0)
        p_s = sources + (i_begin + o_s.to(tl.int64))[:, None] * stride_st
        # No destination: -inf and index 0.
        b_best = tl.full([TILE], -0x7F800001, dtype=tl.int32).to(tl.int64) * 4294967296 + 0x7FFFFFFF
        for i_d in range(i_span * SPAN, tl.minimum(N, (i_span + 1) * SPAN), TILE):
            o_d = i_d + tl.arange(0, TILE)
            m_d = o_d < N
            p_d = destinations + (i_first + o_d.to(tl.int64))[:, None] * stride_dt
            b_cosine = tl.zeros([TILE, TILE], dtype=tl.float32)
            for i_f in range(0, D, BLOCK_D):
                o_f = i_f + tl.arange(0, BLOCK_D)
                m_f = o_f[None, :] < D
                b_s = tl.load(p_s + o_f.to(tl.int64)[None, :] * stride_sd, mask=m_s[:, None] & m_f, other=0.0)
                b_d = tl.load(p_d + o_f.to(tl.int64)[None, :] * stride_dd, mask=m_d[:, None] & m_f, other=0.0)
                if UPCAST:
                    b_s = b_s.to(tl.float32)
                    b_d = b_d.to(tl.float32)
                b_cosine = tl.dot(b_s, tl.trans(b_d), b_cosine, input_precision="ieee")
            b_scale_d = tl.load(destination_scales + i_first + o_d, mask=m_d, other=-1.0)
            m_both = (b_scale_s > 0.0)[:, None] & (b_scale_d > 0.0)[None, :]
            b_cosine = tl.where(m_both, b_cosine * b_scale_s[:, None] * b_scale_d[None, :], 0.0)
            m_whole = (b_scale_s >= 0.0)[:, None] & (b_scale_d >= 0.0)[None, :]
            b_cosine = tl.where(m_whole, b_cosine, -float("inf"))
            b_cosine = tl.where(b_cosine == 0.0, 0.0, b_cosine)
            b_bits = b_cosine.to(tl.int32, bitcast=True)
            b_key = (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
            b_key = b_key | (0x7FFFFFFF - o_d.to(tl.int64))[None, :]
            b_key = tl.where(m_d[None, :], b_key, -0x7FFFFFFFFFFFFFFF)
            b_best = tl.maximum(b_best, tl.max(b_key, 1))
        tl.store(keys + i_span.to(tl.int64) * S + i_begin + o_s, b_best, mask=m_s)


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype} {dim}", bipartite_match_triton,
        (Like(dtype, (1440, dim)), Like(dtype, (1440, dim)), [0, 1440], [0, 1440]),
    )
    for dtype, dim in ((torch.bfloat16, 64), (torch.float32, 1024), (torch.float32, 64))
)  # fmt: skip
