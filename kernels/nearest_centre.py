"""The nearest of a segment's centres for every token, by Euclidean distance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton
from vlmprune.kernels.shared.segments import check_offsets, on_device
from vlmprune.kernels.shared.squared_distances import squared_distances

_TILE = 16


def nearest_centre(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    centres: Tensor,
    centre_offsets: Sequence[int] | Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Return the centre that every token is nearest to, int64 `[tokens]`, as a place in `centres`; -1 where it has none.

    Of equally near centres the first one counts. A centre belongs to itself, whatever lies as near.

    Args:
        features: `[tokens, dim]` floating point, any strides.
        offsets: `[segments + 1]` bounds in `features`; a segment may be empty. A GPU tensor costs one host sync.
        centres: int64 `[centres]`, tokens counted inside their segment, none twice.
        centre_offsets: `[segments + 1]` bounds in `centres`. A GPU tensor costs one host sync.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape or offset.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point [tokens, dim]; got {features.dtype} {tuple(features.shape)}."
        )
    if centres.dim() != 1 or centres.dtype != torch.int64:
        raise ValueError(f"centres must be int64 [centres]; got {centres.dtype} {tuple(centres.shape)}.")
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    ends = check_offsets(centre_offsets, centres.numel(), "centre_offsets")
    if len(bounds) != len(ends):
        raise ValueError(
            f"offsets and centre_offsets must have the same number of segments; got {len(bounds) - 1} and {len(ends) - 1}."
        )
    starts = on_device([bounds[i] for i, (a, b) in enumerate(pairwise(ends)) for _ in range(b - a)], features.device)
    rows = centres + starts
    if chosen == "triton":
        nearest = _nearest_triton(features, bounds, rows, ends)
    else:
        nearest = _nearest_reference(features, bounds, rows, ends)
    return nearest.index_copy(0, rows, torch.arange(len(rows), device=features.device))


def _nearest_reference(features: Tensor, bounds: Sequence[int], rows: Tensor, ends: Sequence[int]) -> Tensor:
    found = torch.full((features.shape[0],), -1, device=features.device)
    for (begin, end), (first, last) in zip(pairwise(bounds), pairwise(ends), strict=True):
        if end > begin and last > first:
            squares = squared_distances(features[None, begin:end], features[None, rows[first:last]])[0]
            # `argmin` may return any of equal values.
            least = squares.amin(1, keepdim=True)
            found[begin:end] = first + (squares == least).to(torch.int8).argmax(1)
    return found


def _nearest_triton(features: Tensor, bounds: Sequence[int], rows: Tensor, ends: Sequence[int]) -> Tensor:
    tokens, dim = features.shape
    nearest = torch.empty(tokens, dtype=torch.int64, device=features.device)
    longest = max((end - begin for begin, end in pairwise(bounds)), default=0)
    if not tokens:
        return nearest
    starts, centres = on_device([*bounds, *ends], features.device).split(len(bounds))
    _nearest_kernel[(len(bounds) - 1, triton.cdiv(longest, _TILE))](
        features, *features.stride(), starts, rows, centres, nearest, dim,
        TILE=_TILE, BLOCK_D=min(32, max(16, triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    return nearest


@triton.jit
def _nearest_kernel(
    features, stride_t, stride_d, starts, rows, ends, nearest, D, TILE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The nearest centres of one tile of tokens, by differences."""
    i_s = tl.program_id(0)
    i_begin = tl.load(starts + i_s)
    T = (tl.load(starts + i_s + 1) - i_begin).to(tl.int32)
    i_first = tl.load(ends + i_s)
    C = (tl.load(ends + i_s + 1) - i_first).to(tl.int32)
    o_m = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m_m = o_m < T
    if tl.program_id(1) * TILE < T:
        p_m = features + (i_begin + o_m.to(tl.int64)) * stride_t
        b_least = tl.full([TILE], float("inf"), dtype=tl.float32)
        b_found = tl.full([TILE], -1, dtype=tl.int64)
        for i_c in range(0, C, TILE):
            o_c = i_c + tl.arange(0, TILE)
            m_c = o_c < C
            b_row = tl.load(rows + i_first + o_c, mask=m_c, other=0)
            b_sum = tl.zeros([TILE, TILE], dtype=tl.float32)
            for i_d in range(0, D, BLOCK_D):
                o_d = i_d + tl.arange(0, BLOCK_D)
                m_d = o_d < D
                o_f = o_d.to(tl.int64) * stride_d
                b_m = tl.load(p_m[:, None] + o_f[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
                p_c = features + b_row[:, None] * stride_t + o_f[None, :]
                b_c = tl.load(p_c, mask=m_c[:, None] & m_d[None, :], other=0.0)
                b_gap = b_m.to(tl.float32)[:, None, :] - b_c.to(tl.float32)[None, :, :]  # [TILE, TILE, BLOCK_D]
                b_sum += tl.sum(b_gap * b_gap, 2)
            b_sum = tl.where(m_c[None, :], b_sum, float("inf"))
            b_here = tl.min(b_sum, 1)
            b_place = i_first + i_c + tl.argmin(b_sum, 1).to(tl.int64)
            b_found = tl.where(b_here < b_least, b_place, b_found)
            b_least = tl.minimum(b_here, b_least)
        tl.store(nearest + i_begin + o_m, b_found, mask=m_m)


COMPILE_CASES = (
    CompileCase(
        "8 x 196", _nearest_triton,
        (Like(torch.bfloat16, (1568, 2048)), list(range(0, 1569, 196)), Like(torch.int64, (80,)), list(range(0, 81, 10))),
    ),
)  # fmt: skip
