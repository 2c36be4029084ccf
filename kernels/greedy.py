"""Greedy choice of diverse tokens: the one loop behind `max_min` (farthest point) and `max_sum`.

Both work on affinities (cosine similarity, or a negated distance). Each token carries its affinity to the chosen set,
the highest ("max") or the total ("sum"); the token with the lowest one is chosen next, the lowest index on ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# The affinities of one segment are kept whole up to this size; above it they are computed from the features again.
GRAM_LIMIT_BYTES = 768 * 2**20

# Stands for "after every proper token": above all cosines and finite distances, below the +inf of a chosen token.
LAST = torch.finfo(torch.float32).max


def unit_rows(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return fp32 rows of length one and the mask of rows that cannot be compared, None if there are none.

    A zero row stays zero, so its cosine to every token is 0. A row with NaN, inf or a norm beyond fp32 becomes zero too,
    and the mask marks it: it is chosen after all others.
    """
    rows = features.to(torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    broken = ~norms.isfinite()
    if not bool(broken.any()):
        return rows / norms.masked_fill(norms == 0, 1.0), None
    return (rows / norms.masked_fill(norms == 0, 1.0)).masked_fill(broken, 0.0), broken.squeeze(-1)


def greedy_reference(
    affinity_to: Callable[[int], Tensor], seed: int, k: int, total: bool, last: Tensor | None
) -> Tensor:
    """Return `k` picks in pick order, int64 `[k]`, the seed first.

    Args:
        affinity_to: gives the fp32 affinities `[tokens]` of every token to a chosen one.
        total: add the affinities up instead of keeping the highest.
        last: bool `[tokens]`, tokens to choose after all others.
    """
    picks = [seed]
    running = affinity_to(seed).clone()
    if last is not None:
        running.masked_fill_(last, LAST)
    combine = torch.add if total else torch.maximum
    for _ in range(k - 1):
        running[picks[-1]] = torch.inf
        if len(picks) > 1:
            combine(running, affinity_to(picks[-1]), out=running)
        picks.append(int(running.argmin()))
    return torch.tensor(picks[:k], dtype=torch.int64, device=running.device)


def lowest_row_maximum(nearest: Tensor, last: Tensor | None) -> int:
    """Return the token whose nearest other token is farthest, from each token's affinity to its nearest `[tokens]`."""
    return int((nearest if last is None else nearest.masked_fill(last, LAST)).argmin())


def features_reference(
    features: Tensor,
    bounds: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int] | None,
    *,
    total: bool,
    gram_limit_bytes: int = GRAM_LIMIT_BYTES,
) -> Tensor:
    """The greedy choice by cosine in every segment of `features` `[tokens, dim]`, int64 `[sum counts]`."""
    picks = [features.new_empty(0, dtype=torch.int64, device=features.device)]
    for segment, ((begin, end), count) in enumerate(zip(pairwise(bounds), counts, strict=True)):
        if count == 0:
            continue
        rows, broken = unit_rows(features[begin:end])
        seed = None if seeds is None else seeds[segment]
        length = end - begin
        # A product with one chosen row reads all features; past about one pick in sixteen the whole matrix is cheaper.
        if (seed is None or count * 16 > length) and 4 * length**2 <= gram_limit_bytes:
            gram = rows @ rows.T
            if seed is None:
                seed = lowest_row_maximum(gram.fill_diagonal_(-torch.inf).amax(1), broken)
            picks.append(greedy_reference(gram.__getitem__, seed, count, total, broken))
        else:
            if seed is None:
                seed = lowest_row_maximum(_nearest_by_blocks(rows), broken)
            picks.append(greedy_reference(lambda pick, rows=rows: rows @ rows[pick], seed, count, total, broken))
    return torch.cat(picks)


def _nearest_by_blocks(rows: Tensor, block: int = 1024) -> Tensor:
    nearest = []
    for begin in range(0, rows.shape[0], block):
        part = rows[begin : begin + block] @ rows.T
        part.diagonal(begin).fill_(-torch.inf)
        nearest.append(part.amax(1))
    return torch.cat(nearest)
