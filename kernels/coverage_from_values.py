"""Greedy coverage of anything by tokens, from what each token covers, as MMTok (arXiv 2508.18264) chooses them."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.greedy_coverage import check_combination, greedy_coverage, launch_coverage
from vlmprune.kernels.shared.implementation import choose_implementation
from vlmprune.kernels.shared.segments import check_counts, on_device


def coverage_from_values(
    values: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    combine: str = "multiply",
    excluded: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return `k` tokens by the rule of `coverage`, int64 `[k]` in pick order.

    A set covers row `r` by the highest `values[token, r]` of its tokens, or by 0 if that is negative. A token whose gain
    or weight is not finite is chosen after all others.

    Args:
        values: `[tokens, rows]`, any real dtype, compared in fp32. Patches to be covered, words, or both side by side.
        k: number of picks, 0..tokens.
        weights: `[tokens]`, 0 or more.
        combine: "multiply" the gain by the weight, or "add" the weight to it.
        excluded: bool `[tokens]`, tokens to choose after all others (padding); as rows they are covered like any other.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, dtype, count or combination.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if values.dim() != 2:
        raise ValueError(f"values must be two-dimensional [tokens, rows]; got shape {tuple(values.shape)}.")
    tokens = values.shape[0]
    (count,) = check_counts([k], [0, tokens])
    check_combination(weights, combine, tokens)
    if excluded is not None and (excluded.shape != (tokens,) or excluded.dtype != torch.bool):
        raise ValueError(f"excluded must be bool [{tokens}]; got {excluded.dtype} {tuple(excluded.shape)}.")
    chosen = choose_implementation(values.device, implementation)
    values = values.to(torch.float32)
    weight = None if weights is None else weights.to(torch.float32)
    gains = values.clamp(min=0).sum(1)
    if chosen == "torch":
        return greedy_coverage(values.__getitem__, gains, count, weight, combine, excluded)
    return _coverage_from_values_triton(values, gains, count, weight, combine, excluded)


def _coverage_from_values_triton(
    values: Tensor, gains: Tensor, k: int, weight: Tensor | None, combine: str, excluded: Tensor | None
) -> Tensor:
    tokens, rows = values.shape
    last = ~gains.isfinite()
    for mask in (excluded, None if weight is None else ~weight.isfinite()):
        if mask is not None:
            last |= mask
    picks = torch.empty(k, dtype=torch.int64, device=values.device)
    if k:
        values = values.contiguous()
        table = on_device([0, tokens, k, 0, 0, 0], values.device)
        # At least one row, which no token covers where there is none: 0 stands for "as many as tokens".
        if rows == 0:
            values, rows = values.new_zeros(tokens, 1), 1
        launch_coverage(values, table, 1, rows, rows, rows, k, weight, combine, last, picks)
    return picks


COMPILE_CASES = (
    CompileCase(
        "2880 x 2892", _coverage_from_values_triton,
        (Like(torch.float32, (2880, 2892)), Like(torch.float32, (2880,)), 320, None, "multiply", None),
    ),
)  # fmt: skip
