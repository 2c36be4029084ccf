"""Greedy max-sum diversification, the first stage of ToDRE (arXiv 2505.18757)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmprune.kernels.greedy import features_reference, features_triton
from vlmprune.kernels.implementation import choose_implementation
from vlmprune.kernels.segments import check_counts, check_offsets, check_seeds


def max_sum(
    features: Tensor,
    offsets: Sequence[int] | Tensor,
    k: Sequence[int] | Tensor,
    seeds: Sequence[int] | Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Return `k[s]` tokens of every segment, each the least similar in sum to those before it: local int64 `[sum k]`.

    In pick order, from `seeds[s]` on; each next pick has the lowest fp32 sum of cosines to all chosen tokens. Ties go
    to the lowest index and no token is chosen twice. Zero rows and rows with NaN or inf count as in `max_min`.

    Args:
        features: `[tokens, dim]` fp16, bf16 or fp32, any strides.
        offsets: `[segments + 1]` bounds in `features`; a segment may be empty. A GPU tensor costs one host sync.
        k: picks per segment, each in 0..length. A GPU tensor costs one host sync.
        seeds: first pick per segment, local; those of empty segments are not read.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, offset, count or seed.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if features.dim() != 2:
        raise ValueError(f"features must be two-dimensional [tokens, dim]; got shape {tuple(features.shape)}.")
    chosen = choose_implementation(features.device, implementation)
    bounds = check_offsets(offsets, features.shape[0])
    counts = check_counts(k, bounds)
    greedy = features_triton if chosen == "triton" else features_reference
    return greedy(features, bounds, counts, check_seeds(seeds, bounds), total=True)
