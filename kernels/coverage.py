"""Greedy coverage of an image by a few of its tokens (facility location), as SCOPE (arXiv 2510.24214) chooses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.cosine_matrix import (
    MATRIX_LIMIT_BYTES,
    all_cosines,
    cosine_matrices,
    groups_that_fit,
    row_scales,
    unit_rows,
)
from vlmprune.kernels.shared.greedy_coverage import check_combination, greedy_coverage, launch_coverage
from vlmprune.kernels.shared.implementation import choose_implementation
from vlmprune.kernels.shared.segments import check_counts, check_offsets, running_starts

# Rows of the matrix that the reference makes at a time where it may not keep all of it.
BLOCK_ROWS = 1024


def coverage(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    k: Sequence[int] | Tensor,
    *,
    weights: Tensor | None = None,
    combine: str = "multiply",
    implementation: str | None = None,
) -> Tensor:
    """Return `k[s]` tokens of every segment that cover it best, one by one: local int64 `[sum k]`, pick order.

    A set covers a token by its highest cosine to the set, or by 0 if that is negative. Each pick has the highest gain in
    the sum of that over all tokens of the segment, in fp32. Ties go to the lowest index and no token is chosen twice.
    A zero row has cosine 0 to everything; a row with NaN or inf too, and is chosen after all others. For other measures
    of coverage see the op `coverage_from_values`.

    Args:
        features: `[tokens, dim]` fp16, bf16 or fp32, any strides.
        offsets: `[segments + 1]` bounds in `features`; a segment may be empty. A GPU tensor costs one host sync.
        k: picks per segment, each in 0..length. A GPU tensor costs one host sync.
        weights: `[tokens]`, any real dtype, 0 or more, compared in fp32; a token whose weight is not finite is chosen
            after all others.
        combine: "multiply" the gain by the weight (SCOPE's default), or "add" the weight to it.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, offset, count or combination.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be two-dimensional [tokens, dim]; got shape {tuple(features.shape)}.")
    check_combination(weights, combine, features.shape[0])
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    counts = check_counts(k, bounds)
    cover = coverage_triton if chosen == "triton" else coverage_reference
    return cover(features, bounds, counts, weights, combine)


def coverage_reference(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    weights: Tensor | None,
    combine: str,
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`coverage` in plain torch, for arguments that are already checked."""
    picks = [torch.empty(0, dtype=torch.int64, device=features.device)]
    for (begin, end), count in zip(pairwise(bounds), counts, strict=True):
        if count == 0:
            continue
        rows, last = unit_rows(features[begin:end])
        weight = None if weights is None else weights[begin:end].to(torch.float32)
        values_of: Callable[[Tensor | slice], Tensor] = partial(_cosines, rows)
        if 4 * (end - begin) ** 2 <= limit_bytes:
            matrix = all_cosines(rows)
            values_of = matrix.__getitem__
            gains = matrix.clamp(min=0).sum(1)
        else:
            gains = torch.cat([(part @ rows.T).clamp_(min=0).sum(1) for part in rows.split(BLOCK_ROWS)])
        picks.append(greedy_coverage(values_of, gains, count, weight, combine, last))
    return torch.cat(picks)


def _cosines(rows: Tensor, some: Tensor | slice) -> Tensor:
    return rows[some] @ rows.T


def coverage_triton(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    weights: Tensor | None,
    combine: str,
    *,
    limit_bytes: int = MATRIX_LIMIT_BYTES,
) -> Tensor:
    """`coverage` in three launches: row scales, cosines, and the whole loop.

    Segments whose matrix would break the limit go through the reference, on the device.
    """
    starts = running_starts(counts)
    picks = torch.empty(starts[-1], dtype=torch.int64, device=features.device)
    if starts[-1] == 0:
        return picks
    weights = None if weights is None else weights.to(torch.float32)
    scales = row_scales(features)
    last = scales < 0
    if weights is not None:
        last |= ~weights.isfinite()
    groups, too_long = groups_that_fit(bounds, counts, limit_bytes)
    for group in groups:
        cosines = cosine_matrices(features, scales, bounds, counts, starts, group)
        launch_coverage(
            *(cosines.values, cosines.table, len(group), 0, 0, cosines.longest, max(counts[s] for s in group)),
            *(weights, combine, last, picks),
        )
    for segment in too_long:
        piece = slice(bounds[segment], bounds[segment + 1])
        weight = None if weights is None else weights[piece]
        picks[starts[segment] : starts[segment + 1]] = coverage_reference(
            features[piece], [0, piece.stop - piece.start], [counts[segment]], weight, combine, limit_bytes=limit_bytes
        )
    return picks


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype}{' weighted, ' + combine if weighted else ''}", coverage_triton,
        (Like(dtype, (2880, 1024)), [0, 2880], [320], Like(torch.float32, (2880,)) if weighted else None, combine),
    )
    for dtype, weighted, combine in (
        (torch.bfloat16, False, "multiply"), (torch.bfloat16, True, "multiply"), (torch.bfloat16, True, "add")
    )
)  # fmt: skip
