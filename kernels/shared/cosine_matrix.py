"""Cosines between the tokens of ragged segments: the matrices that the greedy ops read, one launch for many segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.shared.implementation import dot_needs_fp32, tl, triton
from vlmprune.kernels.shared.segments import on_device, running_starts

# The cosines of one segment are kept whole up to this size; above it they are computed from the features again.
MATRIX_LIMIT_BYTES = 768 * 2**20

# Side of the square tiles of the matrix.
TILE = 128

# Rows of a symmetric product that a CPU computes at a time, from the diagonal on.
MIRROR_ROWS = 192

# Rows of a kept matrix begin at multiples of this many elements, so that the loads of a row are wide.
ROW_ALIGNMENT = 32

# Stands for "after every proper token": above all cosines and finite distances, below the +inf of a chosen token.
LAST = torch.finfo(torch.float32).max


class CosineMatrices(NamedTuple):
    """Cosine matrices of a group of segments, in one buffer.

    Attributes:
        values: fp32, the matrices one after the other, rows `row_stride(length)` apart.
        nearest: fp32 `[tiles, length]` per segment: each token's highest cosine to the other tokens of a tile.
        table: int64, six numbers a segment: first token, length, picks, and where its picks, matrix and `nearest` begin.
        longest: length of the longest segment.
    """

    values: Tensor
    nearest: Tensor
    table: Tensor
    longest: int


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


def cosine_matrix(rows: Tensor, picks: int, limit_bytes: int, whole: bool = False) -> Tensor | None:
    """Return `rows rows^T` of unit rows `[tokens, dim]` where that is the cheapest way to `picks` rows of it, else None.

    `whole` says that all of it will be read. It is never made above `limit_bytes`.
    """
    tokens = rows.shape[0]
    # A product with one chosen row reads all features; past about one pick in sixteen the whole matrix is cheaper.
    return all_cosines(rows) if (whole or picks * 16 > tokens) and 4 * tokens**2 <= limit_bytes else None


def all_cosines(rows: Tensor) -> Tensor:
    """Return `rows rows^T` of unit rows `[tokens, dim]`, fp32; on a CPU one half is computed and mirrored."""
    tokens = rows.shape[0]
    if rows.device.type != "cpu" or tokens < 2 * MIRROR_ROWS or rows.requires_grad:
        return rows @ rows.T
    cosines = rows.new_empty(tokens, tokens)
    for begin in range(0, tokens, MIRROR_ROWS):
        end = min(begin + MIRROR_ROWS, tokens)
        torch.mm(rows[begin:end], rows[begin:].T, out=cosines[begin:end, begin:])
        cosines[end:, begin:end] = cosines[begin:end, end:].T
    return cosines


def cosines_to(rows: Tensor, matrix: Tensor | None) -> Callable[[int], Tensor]:
    """Return a function that gives the cosines `[tokens]` of all unit rows to one, from `cosine_matrix` if there is one."""
    return partial(_row, rows) if matrix is None else matrix.__getitem__


def _row(rows: Tensor, pick: int) -> Tensor:
    return rows @ rows[pick]


def row_scales(features: Tensor) -> Tensor:
    """Return 1 / norm of each row of `[tokens, dim]`, fp32: 0 for a zero row, -1 for a row whose norm is not finite."""
    tokens, dim = features.shape
    scales = torch.empty(tokens, dtype=torch.float32, device=features.device)
    if tokens:
        block = min(1024, max(16, triton.next_power_of_2(dim)))
        _scale_kernel[(triton.cdiv(tokens, 4),)](
            features, *features.stride(), scales, tokens, dim, BLOCK_T=4, BLOCK_D=block, num_warps=4
        )
    return scales


def groups_that_fit(
    bounds: Sequence[int], counts: Sequence[int], limit_bytes: int
) -> tuple[list[list[int]], list[int]]:
    """Return groups of segments whose matrices fit the limit together, and the segments that break it alone."""
    groups: list[list[int]] = []
    too_long: list[int] = []
    size = 0
    for segment, (begin, end) in enumerate(pairwise(bounds)):
        if counts[segment] == 0:
            continue
        needed = 4 * row_stride(end - begin) * (end - begin)
        if needed > limit_bytes:
            too_long.append(segment)
        elif groups and size + needed <= limit_bytes:
            groups[-1].append(segment)
            size += needed
        else:
            groups.append([segment])
            size = needed
    return groups, too_long


def cosine_matrices(
    features: Tensor,
    scales: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    starts: Sequence[int],
    group: Sequence[int],
    *,
    maxima: bool = False,
) -> CosineMatrices:
    """Return the cosine matrices of the segments of a group, from one launch.

    The products are taken on the stored rows with fp32 sums and scaled afterwards, so fp16 and bf16 features use the
    tensor cores without losing a bit; fp32 features are multiplied in IEEE fp32.

    Args:
        features: `[tokens, dim]`.
        scales: of `row_scales`.
        bounds: `[segments + 1]` bounds of all segments.
        counts: picks of all segments.
        starts: where the picks of each segment begin.
        group: numbers of the segments to work on.
        maxima: fill `nearest` too.
    """
    device = features.device
    lengths = [bounds[segment + 1] - bounds[segment] for segment in group]
    tiles = [triton.cdiv(length, TILE) for length in lengths]
    matrices = running_starts([row_stride(length) * length for length in lengths])
    peaks = running_starts([count * length for count, length in zip(tiles, lengths, strict=True)])
    rows = zip(group, lengths, matrices, peaks, strict=False)
    table = on_device(
        [n for s, length, matrix, peak in rows for n in (bounds[s], length, counts[s], starts[s], matrix, peak)], device
    )
    values = torch.empty(matrices[-1], dtype=torch.float32, device=device)
    nearest = torch.empty(peaks[-1] if maxima else 1, dtype=torch.float32, device=device)
    most = max(tiles)
    _launch(features, scales, table, values, nearest, (most * (most + 1) // 2, len(group)), maxima, True)
    return CosineMatrices(values, nearest, table, max(lengths))


def nearest_others_triton(features: Tensor, scales: Tensor) -> Tensor:
    """Return the highest cosine of each row to another one, fp32 `[tokens]`, of features not scaled yet, without the matrix."""
    tokens = features.shape[0]
    tiles = triton.cdiv(tokens, TILE)
    nearest = torch.empty(tiles, tokens, dtype=torch.float32, device=features.device)
    table = on_device([0, tokens, 0, 0, 0, 0], features.device)
    _launch(features, scales, table, nearest, nearest, (tiles * (tiles + 1) // 2, 1), True, False)
    return nearest.amax(0)


def row_stride(tokens: int) -> int:
    """Return how many elements the rows of a kept matrix are apart."""
    return -(-tokens // ROW_ALIGNMENT) * ROW_ALIGNMENT


def _launch(
    features: Tensor,
    scales: Tensor,
    table: Tensor,
    values: Tensor,
    nearest: Tensor,
    grid: tuple[int, int],
    maxima: bool,
    keep: bool,
) -> None:
    dim = features.shape[1]
    block_dim = min(128 // features.element_size(), max(16, triton.next_power_of_2(dim)))
    _cosine_kernel[grid](
        *(features, *features.stride(), scales, table, values, nearest, dim),
        TILE=TILE, BLOCK_D=block_dim, ALIGNMENT=ROW_ALIGNMENT, MAXIMA=maxima, KEEP=keep, UPCAST=dot_needs_fp32(features),
        num_warps=8, num_stages=3,
    )  # fmt: skip


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
def _cosine_kernel(
    features,
    stride_t,
    stride_d,
    scales,
    table,
    values,
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
            p_values = values + tl.multiple_of(tl.load(p_table + 4), ALIGNMENT)
            tl.store(
                p_values + o_r.to(tl.int64)[:, None] * stride + o_c[None, :], b_cosine, mask=m_r[:, None] & m_c[None, :]
            )
            if i_r != i_c:
                b_mirror = tl.trans(b_cosine)
                tl.store(
                    p_values + o_c.to(tl.int64)[:, None] * stride + o_r[None, :],
                    b_mirror,
                    mask=m_c[:, None] & m_r[None, :],
                )
