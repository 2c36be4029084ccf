"""Assign every token to its most similar target and merge it there, as VisionZip's contextual tokens are made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.bipartite_match import bipartite_match
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.shared.compile_cases import CompileCase
from vlmprune.kernels.shared.implementation import choose_implementation
from vlmprune.kernels.shared.segments import check_offsets, on_device

COMBINATIONS = ("mean", "target_plus_mean")


class MergedTargets(NamedTuple):
    """What `merge_to_targets` returns.

    Attributes:
        values: `[targets, dim]`, dtype of the values.
        sizes: fp32 `[targets]`, what each target now stands for.
        groups: int64 `[tokens]`, the row of `values` that each token went into, -1 for a token that took no part.
    """

    values: Tensor
    sizes: Tensor
    groups: Tensor


def merge_to_targets(
    values: Tensor,
    metric: Tensor,
    offsets: Sequence[int] | Tensor,
    targets: Tensor,
    target_offsets: Sequence[int] | Tensor,
    *,
    joins: Tensor | None = None,
    sizes: Tensor | None = None,
    combine: str = "mean",
    implementation: str | None = None,
) -> MergedTargets:
    """Merge the tokens of every segment into its targets: each goes to the target with the highest cosine of `metric`.

    Cosines and sums are fp32; equal cosines go to the target that comes first, as by `bipartite_match`. A target stays
    in its own group, whatever is most similar to it.

    Args:
        values: `[tokens, dim]` floating point, what is merged, any strides.
        metric: `[tokens, metric_dim]`, what is compared (keys, features); may be `values`.
        offsets: `[segments + 1]` bounds in `values`; a segment may be empty. A GPU tensor costs one host sync.
        targets: int64 `[targets]`, indices local to the segment, no index twice. Not checked on a GPU.
        target_offsets: `[segments + 1]` bounds in `targets`. A GPU tensor costs one host sync.
        joins: bool `[tokens]`, which tokens take part besides the targets; None for all.
        sizes: `[tokens]`, what each token stands for; None for 1 each.
        combine: "mean" (average of the target and its members, by size) or "target_plus_mean" (the target plus the
            average of its members, as the official codes of VisionZip and VisionDrop do).
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, offset, target or combination; tokens in a segment without a target.
        KernelUnavailableError: the forced implementation cannot run.
    """
    tokens = values.shape[0]
    _check(values, metric, targets, joins, sizes, combine)
    chosen = choose_implementation(values.device, implementation)
    bounds = check_offsets(offsets, tokens)
    ends = check_offsets(target_offsets, targets.numel(), "target_offsets")
    if len(bounds) != len(ends):
        raise ValueError(
            f"offsets and target_offsets must have the same number of segments; got {len(bounds) - 1} and {len(ends) - 1}."
        )
    first_tokens, first_targets = [], []
    for segment, ((begin, end), (first, last)) in enumerate(zip(pairwise(bounds), pairwise(ends), strict=True)):
        if end > begin and first == last:
            raise ValueError(f"segment {segment} has {end - begin} tokens and no target.")
        first_tokens += [begin] * (last - first)
        first_targets += [first] * (end - begin)
    if chosen == "torch":
        _check_targets(targets, bounds, ends)
    rows = targets + on_device(first_tokens, values.device)
    partners, _ = bipartite_match(metric, metric[rows], bounds, ends, implementation=implementation)
    groups = partners + on_device(first_targets, values.device)
    if joins is not None:
        groups.masked_fill_(~joins, -1)
    own = torch.arange(targets.numel(), device=values.device)
    if combine == "mean":
        groups[rows] = own
        merged, total = merge_scatter(values, groups, sizes, targets.numel(), implementation=implementation)
        return MergedTargets(merged, total, groups)
    groups[rows] = -1
    members, total = merge_scatter(
        values, groups, sizes, targets.numel(), out_dtype=torch.float32, implementation=implementation
    )
    groups[rows] = own
    total = total + (1.0 if sizes is None else sizes[rows].to(torch.float32))
    return MergedTargets((members + values[rows].to(torch.float32)).to(values.dtype), total, groups)


def _check_targets(targets: Tensor, bounds: Sequence[int], ends: Sequence[int]) -> None:
    for segment, ((begin, end), (first, last)) in enumerate(zip(pairwise(bounds), pairwise(ends), strict=True)):
        some = targets[first:last]
        if some.numel() and not (int(some.min()) >= 0 and int(some.max()) < end - begin):
            raise ValueError(
                f"targets of segment {segment} must lie in 0..{end - begin - 1}; got {int(some.min())}..{int(some.max())}."
            )
        if some.unique().numel() != some.numel():
            raise ValueError(f"targets of segment {segment} name a token twice: {some.tolist()}.")


def _check(
    values: Tensor, metric: Tensor, targets: Tensor, joins: Tensor | None, sizes: Tensor | None, combine: str
) -> None:
    tokens = values.shape[0]
    if combine not in COMBINATIONS:
        raise ValueError(f"combine={combine!r} is not one of {', '.join(COMBINATIONS)}.")
    if values.dim() != 2 or not values.is_floating_point():
        raise ValueError(f"values must be floating point [tokens, dim]; got {values.dtype} {tuple(values.shape)}.")
    if metric.dim() != 2 or metric.shape[0] != tokens:
        raise ValueError(f"metric must be [{tokens}, metric_dim]; got {tuple(metric.shape)}.")
    if targets.dim() != 1 or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [targets]; got {targets.dtype} {tuple(targets.shape)}.")
    if joins is not None and (joins.shape != (tokens,) or joins.dtype != torch.bool):
        raise ValueError(f"joins must be bool [{tokens}]; got {joins.dtype} {tuple(joins.shape)}.")
    if sizes is not None and sizes.shape != (tokens,):
        raise ValueError(f"sizes must be [{tokens}]; got {tuple(sizes.shape)}.")


# Only the kernels of `bipartite_match` and `merge_scatter`.
COMPILE_CASES: tuple[CompileCase, ...] = ()
