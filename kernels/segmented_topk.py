"""The k highest scores of each ragged segment, in one launch, with a defined order for ties, NaN and infinities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from vlmprune.kernels.implementation import choose_implementation
from vlmprune.kernels.segments import check_counts, check_offsets

ORDERS = ("position", "score")


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
    choose_implementation(scores.device, implementation)
    bounds = check_offsets(offsets, scores.numel())
    return segmented_topk_reference(scores, bounds, check_counts(k, bounds), order=order)


def segmented_topk_reference(scores: Tensor, bounds: Sequence[int], counts: Sequence[int], *, order: str) -> Tensor:
    """`segmented_topk` in plain torch, for offsets and counts that are already checked Python ints."""
    keys = ordered_keys(scores).to(torch.int64) << 32
    picks = [scores.new_empty(0, dtype=torch.int64)]
    for (begin, end), count in zip(pairwise(bounds), counts, strict=True):
        # With the index in the low half no two keys are equal, so top-k has no ties left to break.
        unique = keys[begin:end] - torch.arange(end - begin, device=keys.device)
        best = -unique.topk(count, sorted=order == "score").values & 0xFFFFFFFF
        picks.append(best if order == "score" else best.sort().values)
    return torch.cat(picks)


def ordered_keys(scores: Tensor) -> Tensor:
    """Return int32 keys in the order of the fp32 scores: NaN lowest, then -inf, with 0.0 equal to -0.0."""
    values = scores.to(torch.float32) + 0.0
    bits = values.contiguous().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return keys.masked_fill_(values.isnan(), -0x7FFFFFFF)
