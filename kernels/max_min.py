"""Farthest-point choice of tokens (max-min diversity), as DivPrune (arXiv 2503.02175) and greedy k-center use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.kernels.greedy import (
    LAST,
    affinity_triton,
    features_reference,
    features_triton,
    greedy_reference,
    lowest_row_maximum,
)
from vlmprune.kernels.implementation import choose_implementation
from vlmprune.kernels.segments import check_counts, check_offsets, check_seeds, on_device


def max_min(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    k: Sequence[int] | Tensor,
    *,
    seeds: Sequence[int] | Tensor | None = None,
    metric: str = "cosine",
    implementation: str | None = None,
) -> Tensor:
    """Return `k[s]` tokens of every segment, each the farthest from those before it: local int64 `[sum k]`, pick order.

    The first pick is DivPrune's (the token whose nearest other token is farthest) or `seeds[s]`; each next one has the
    lowest of the highest fp32 cosines to the chosen tokens. Ties go to the lowest index and no token is chosen twice.
    A zero row has cosine 0 to everything; a row with NaN or inf too, and is chosen after all others.

    Args:
        features: `[tokens, dim]` fp16, bf16 or fp32, any strides.
        offsets: `[segments + 1]` bounds in `features`; a segment may be empty. A GPU tensor costs one host sync.
        k: picks per segment, each in 0..length. A GPU tensor costs one host sync.
        seeds: first pick per segment, local; those of empty segments are not read.
        metric: "cosine"; for other distances see `max_min_from_distances`.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, metric, offset, count or seed.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be two-dimensional [tokens, dim]; got shape {tuple(features.shape)}.")
    if metric != "cosine":
        raise ValueError(f"metric={metric!r} is not 'cosine'; give other distances to max_min_from_distances.")
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    counts = check_counts(k, bounds)
    firsts = None if seeds is None else check_seeds(seeds, bounds)
    greedy = features_triton if chosen == "triton" else features_reference
    return greedy(features, bounds, counts, firsts, total=False)


def max_min_from_distances(
    distances: Tensor, k: int, *, seed: int | None = None, implementation: str | None = None
) -> Tensor:
    """Return `k` rows of a distance matrix by the rule of `max_min`: int64 `[k]` in pick order.

    `distances[s, j]` is the distance of token `j` from a chosen `s`; the diagonal is not read. A token with
    a NaN distance to a chosen one is chosen after all others.

    Args:
        distances: `[tokens, tokens]`, any real dtype, compared in fp32.
        k: number of picks, 0..tokens.
        seed: first pick; None for the token whose nearest other token is farthest.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, count or seed.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if distances.dim() != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances must be square [tokens, tokens]; got shape {tuple(distances.shape)}.")
    tokens = distances.shape[0]
    (count,) = check_counts([k], [0, tokens])
    chosen = choose_implementation(distances.device, implementation)
    if seed is not None:
        (seed,) = check_seeds([seed], [0, tokens])
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=distances.device)
    affinity = torch.nan_to_num(-distances.to(torch.float32), nan=LAST, posinf=LAST, neginf=-LAST)
    affinity.fill_diagonal_(-LAST)
    if chosen == "triton":
        first = affinity.amax(0).argmin() if seed is None else on_device([seed], distances.device)
        return affinity_triton(affinity, first, count)
    if seed is None:
        seed = lowest_row_maximum(affinity.amax(0), None)
    return greedy_reference(affinity.__getitem__, seed, count, False, None)
