"""Tokens of an image that their neighbours do not predict, the choice of PixelPrune (arXiv 2604.00886)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton
from vlmprune.kernels.shared.segments import on_device, running_starts

METRICS = ("max", "mae", "rmse")
SCANS = ("pred_2d", "raster", "serpentine")

# Elements of two compared blocks of tokens that the reference holds at a time.
BLOCK_ELEMENTS = 2**20

# Values of a token that a program compares at a time.
BLOCK = 1024


def unpredicted_tokens(
    values: Tensor,
    grids: Sequence[tuple[int, int]],
    *,
    tau: float = 0.0,
    metric: str = "max",
    scan: str = "pred_2d",
    anchored: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """Return which tokens differ from their prediction, bool `[tokens]`; the first token of an image always does.

    Two tokens are alike if the `metric` of their difference, fp32, is at most `tau`. The scan "pred_2d" predicts by the left
    (A), upper (B) and upper left (C) neighbour, as LOCO-I does: by A in the first row, by B in the first column, else by B
    where C is like A and not like B, and otherwise by A. "raster" and "serpentine" predict by the last token that differed,
    row by row, and with odd rows from right to left. A token with NaN is like none.

    Args:
        values: `[tokens, dim]` floating point, images one after the other, each row by row, any strides.
        grids: rows and columns of each image.
        tau: tolerance.
        metric: "max" or "mae" (mean) of absolute differences, or "rmse" (root of the mean square).
        scan: as above.
        anchored: whether "pred_2d" reads a neighbour that was itself predicted as its prediction, so that small
            differences cannot add up; otherwise as it is. Both are the same at `tau=0`.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, grid, metric or scan.
        KernelUnavailableError: the forced implementation cannot run.
    """
    grids = [(int(rows), int(columns)) for rows, columns in grids]
    _check(values, grids, metric, scan)
    if choose_implementation(values.device, implementation) == "triton":
        return _unpredicted_tokens_triton(values, grids, tau, metric, scan, anchored and tau > 0)
    return unpredicted_tokens_reference(values, grids, tau, metric, scan, anchored and tau > 0)


def unpredicted_tokens_reference(
    values: Tensor, grids: Sequence[tuple[int, int]], tau: float, metric: str, scan: str, anchored: bool
) -> Tensor:
    """`unpredicted_tokens` in plain torch, for arguments that are already checked."""
    starts = running_starts([rows * columns for rows, columns in grids])
    kept = [values.new_empty(0, dtype=torch.bool)]
    for first, (rows, columns) in zip(starts[:-1], grids, strict=True):
        image = values[first : first + rows * columns].float()
        if scan == "pred_2d":
            kept.append(_predict_by_neighbours(image, rows, columns, tau, metric, anchored))
        else:
            order = torch.arange(rows * columns, device=values.device).view(rows, columns)
            if scan == "serpentine":
                order[1::2] = order[1::2].flip(1)
            kept.append(_predict_by_last(image, order.flatten(), tau, metric))
    return torch.cat(kept)


def _predict_by_neighbours(image: Tensor, rows: int, columns: int, tau: float, metric: str, anchored: bool) -> Tensor:
    """`anchored` goes along the diagonals, whose tokens are predicted by the two diagonals before."""
    places = torch.arange(rows * columns, device=image.device).view(rows, columns)
    # Whose values each token is read with.
    origin = places.flatten().clone()
    kept = torch.ones(rows * columns, dtype=torch.bool, device=image.device)
    diagonals = places.flip(1)
    steps = [diagonals.diagonal(columns - 1 - step) for step in range(1, rows + columns - 1)]
    for tokens in steps if anchored else [places.flatten()[1:]]:
        row, column = tokens // columns, tokens % columns
        left = origin[(tokens - 1).clamp(min=0)]
        above = origin[(tokens - columns).clamp(min=0)]
        corner = origin[(tokens - columns - 1).clamp(min=0)]
        by_above = _alike(image, corner, left, tau, metric) & ~_alike(image, corner, above, tau, metric)
        by_above = ((row > 0) & by_above) | (column == 0)
        prediction = torch.where(by_above, above, left)
        predicted = _alike(image, tokens, prediction, tau, metric)
        kept[tokens] = ~predicted
        if anchored:
            origin[tokens] = torch.where(predicted, prediction, tokens)
    return kept


def _predict_by_last(image: Tensor, order: Tensor, tau: float, metric: str) -> Tensor:
    kept = torch.zeros(len(order), dtype=torch.bool, device=image.device)
    block, last = max(1, BLOCK_ELEMENTS // max(1, image.shape[1])), 0
    while last < len(order):
        kept[order[last]] = True
        following = last + 1
        while following < len(order):
            some = order[following : following + block]
            differs = (~_alike(image, some, order[last : last + 1].expand_as(some), tau, metric)).nonzero()
            if len(differs):
                following += int(differs[0])
                break
            following += len(some)
        last = following
    return kept


def _alike(image: Tensor, first: Tensor, second: Tensor, tau: float, metric: str) -> Tensor:
    block = max(1, BLOCK_ELEMENTS // max(1, image.shape[1]))
    parts = [
        _distance(image[some] - image[other], metric) <= tau
        for some, other in zip(first.split(block), second.split(block), strict=True)
    ]
    return torch.cat(parts) if parts else first.new_empty(0, dtype=torch.bool)


def _distance(difference: Tensor, metric: str) -> Tensor:
    if metric == "rmse":
        return difference.square().mean(-1).sqrt()
    return difference.abs().amax(-1) if metric == "max" else difference.abs().mean(-1)


def _unpredicted_tokens_triton(
    values: Tensor, grids: Sequence[tuple[int, int]], tau: float, metric: str, scan: str, anchored: bool
) -> Tensor:
    """One launch a diagonal of all images, one in all where every token is read as it is, and one program an image by rows."""
    device, (tokens, dim) = values.device, values.shape
    kept = torch.empty(tokens, dtype=torch.int8, device=device)
    if tokens == 0:
        return kept.bool()
    origin = torch.arange(tokens, device=device)
    starts = running_starts([rows * columns for rows, columns in grids])
    table = on_device([*starts[:-1], *(rows for rows, _ in grids), *(columns for _, columns in grids)], device)
    shared = (values, *values.stride(), table, kept, len(grids), dim, float(tau))
    block = min(BLOCK, max(16, triton.next_power_of_2(dim)))
    kind = METRICS.index(metric)
    if scan != "pred_2d":
        _by_last_kernel[(len(grids),)](
            *shared, SERPENTINE=scan == "serpentine", METRIC=kind, BLOCK_D=block, num_warps=4
        )
    elif anchored:
        longest = max(min(grid) for grid in grids)
        for step in range(max(rows + columns - 1 for rows, columns in grids)):
            _by_neighbours_kernel[(longest, len(grids))](
                *shared, origin, step, ANCHORED=True, METRIC=kind, BLOCK_D=block, num_warps=4
            )
    else:
        most = max(rows * columns for rows, columns in grids)
        _by_neighbours_kernel[(most, len(grids))](
            *shared, origin, 0, ANCHORED=False, METRIC=kind, BLOCK_D=block, num_warps=4
        )
    return kept.bool()


@triton.jit
def _are_alike(p_first, p_second, stride_d, D, tau, METRIC: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whether two tokens are alike; the largest, the mean or the root of the mean square of their differences."""
    b_part = tl.zeros([BLOCK_D], dtype=tl.float32)
    # A maximum may pass over NaN, so it is looked for beside.
    b_broken = tl.zeros([BLOCK_D], dtype=tl.int32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        o_d = o_d.to(tl.int64) * stride_d
        b_first = tl.load(p_first + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_second = tl.load(p_second + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_gap = tl.abs(b_first - b_second)
        b_broken = b_broken | (b_gap != b_gap).to(tl.int32)
        if METRIC == 0:
            b_part = tl.maximum(b_part, b_gap)
        elif METRIC == 1:
            b_part += b_gap
        else:
            b_part += b_gap * b_gap
    if METRIC == 0:
        distance = tl.max(b_part, 0)
    elif METRIC == 1:
        distance = tl.sum(b_part, 0) / D
    else:
        distance = tl.sqrt(tl.sum(b_part, 0) / D)
    return (distance <= tau) & (tl.max(b_broken, 0) == 0)


@triton.jit
def _by_neighbours_kernel(
    values,
    stride_t,
    stride_d,
    table,
    kept,
    IMAGES,
    D,
    tau,
    origin,
    step,
    ANCHORED: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token a program: of one diagonal, or any."""
    i_g = tl.program_id(1)
    i_begin = tl.load(table + i_g)
    R = tl.load(table + IMAGES + i_g)
    C = tl.load(table + 2 * IMAGES + i_g)
    if ANCHORED:
        i_row = tl.program_id(0) + tl.maximum(step - C + 1, 0)
        i_column = step - i_row
    else:
        i_row = tl.program_id(0) // tl.maximum(C, 1)
        i_column = tl.program_id(0) - i_row * C
    if (i_row < R) & (i_column >= 0) & (i_column < C):
        i_token = i_begin + i_row * C + i_column
        if i_row + i_column == 0:
            tl.store(kept + i_token, tl.full([], 1, dtype=tl.int8))
        else:
            i_left = tl.load(origin + i_token - 1, mask=i_column > 0, other=0)
            i_above = tl.load(origin + i_token - C, mask=i_row > 0, other=0)
            i_corner = tl.load(origin + i_token - C - 1, mask=(i_row > 0) & (i_column > 0), other=0)
            by_above = i_column == 0
            if (i_row > 0) & (i_column > 0):
                p_corner = values + i_corner * stride_t
                by_above = _are_alike(p_corner, values + i_left * stride_t, stride_d, D, tau, METRIC, BLOCK_D)
                like_above = _are_alike(p_corner, values + i_above * stride_t, stride_d, D, tau, METRIC, BLOCK_D)
                by_above = by_above & (like_above == 0)
            i_prediction = tl.where(by_above, i_above, i_left)
            p_token, p_prediction = values + i_token * stride_t, values + i_prediction * stride_t
            predicted = _are_alike(p_token, p_prediction, stride_d, D, tau, METRIC, BLOCK_D)
            tl.store(kept + i_token, tl.where(predicted, 0, 1).to(tl.int8))
            if ANCHORED:
                tl.store(origin + i_token, tl.where(predicted, i_prediction, i_token))


@triton.jit
def _by_last_kernel(
    values,
    stride_t,
    stride_d,
    table,
    kept,
    IMAGES,
    D,
    tau,
    SERPENTINE: tl.constexpr,
    METRIC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One image a program, token after token."""
    i_g = tl.program_id(0)
    i_begin = tl.load(table + i_g)
    R = tl.load(table + IMAGES + i_g)
    C = tl.load(table + 2 * IMAGES + i_g)
    i_last = i_begin
    if R * C > 0:
        tl.store(kept + i_begin, tl.full([], 1, dtype=tl.int8))
    for i_step in range(1, R * C):
        i_row = i_step // C
        i_column = i_step - i_row * C
        if SERPENTINE:
            i_column = tl.where(i_row % 2 == 1, C - 1 - i_column, i_column)
        i_token = i_begin + i_row * C + i_column
        p_last = values + i_last * stride_t
        predicted = _are_alike(values + i_token * stride_t, p_last, stride_d, D, tau, METRIC, BLOCK_D)
        tl.store(kept + i_token, tl.where(predicted, 0, 1).to(tl.int8))
        i_last = tl.where(predicted, i_last, i_token)


def _check(values: Tensor, grids: Sequence[tuple[int, int]], metric: str, scan: str) -> None:
    for name, value, allowed in (("metric", metric, METRICS), ("scan", scan, SCANS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
    if values.dim() != 2 or not values.is_floating_point() or values.shape[1] == 0:
        raise ValueError(f"values must be floating point [tokens, dim]; got {values.dtype} {tuple(values.shape)}.")
    if any(min(grid) < 1 for grid in grids):
        raise ValueError(f"grids={grids} must have 1 row and 1 column or more.")
    tokens = sum(map(math.prod, grids))
    if tokens != values.shape[0]:
        raise ValueError(f"grids={grids} have {tokens} tokens, values have {values.shape[0]}.")


COMPILE_CASES = tuple(
    CompileCase(
        f"{scan} {metric}{' anchored' if tau else ''}", _unpredicted_tokens_triton,
        (Like(torch.float32, (1200, 3072)), [(30, 40)], tau, metric, scan, tau > 0),
    )
    for scan, metric, tau in (
        ("pred_2d", "max", 0.0), ("pred_2d", "mae", 0.1), ("pred_2d", "rmse", 0.1), ("raster", "max", 0.0),
        ("serpentine", "rmse", 0.1),
    )
)  # fmt: skip
