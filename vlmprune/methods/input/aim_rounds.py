"""AIM's merging: rounds of bipartite matching in which the most similar tokens of every tile join their partner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vlmprune.kernels.bipartite_match import bipartite_match
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.shared.tile_segments import to_device


@dataclass(frozen=True, eq=False)
class MergeRound:
    """One round as far as counts tell, on the CPU; tokens are packed, segment after segment.

    Attributes:
        sources: int64, tokens in even places of the segments that merge.
        destinations: int64, those in odd places.
        source_offsets: bounds of these segments in `sources`.
        destination_offsets: bounds in `destinations`.
        removed: tokens that each of these segments loses.
        rank_to_row: int64 `[sources]`, by falling similarity inside each segment: the row that a source becomes, -1 where it
            joins its partner.
        destination_rows: int64 `[destinations]`, the row that each becomes.
        others: int64 `[2, tokens]`, the tokens of segments that do not merge, and their rows.
        rows: tokens after the round.
    """

    sources: Tensor
    destinations: Tensor
    source_offsets: tuple[int, ...]
    destination_offsets: tuple[int, ...]
    removed: tuple[int, ...]
    rank_to_row: Tensor
    destination_rows: Tensor
    others: Tensor
    rows: int


@dataclass(frozen=True, eq=False)
class Merged:
    """What a merge gives, segment after segment, in the order of the official code.

    Attributes:
        values: fp32 `[rows, dim]`.
        positions: int64 `[rows]`, the packed token whose place each row takes: itself, or the last destination.
        groups: int64 `[tokens]`, the row that each token went into.
        rounds: per round int64 on the device, the row that each token of that round becomes, and how many rows there are.
    """

    values: Tensor
    positions: Tensor
    groups: Tensor
    rounds: tuple[tuple[Tensor, int], ...]


def rounds_left(count: int, rounds: int) -> int:
    """Return the tokens left of `count` after the published rounds, which remove `count // 2`, `count // 4` and so on."""
    left = count
    for number in range(1, rounds + 1):
        left -= min(count >> number, left // 2)
    return left


@lru_cache(maxsize=64)
def plan_rounds(sizes: tuple[int, ...], budgets: tuple[int, ...]) -> tuple[MergeRound, ...]:
    """Return the rounds that leave `budgets[s]` of the `sizes[s]` tokens of each segment, at least one of each that has any.

    Each removes half of the segment's first number, then a quarter and so on, at most half of what is left and what is
    too much.
    """
    current, planned, number = list(sizes), [], 0
    while any(size > max(1, budget) for size, budget in zip(current, budgets, strict=True)):
        number += 1
        removed = [
            min(max(1, first >> number), size // 2, size - max(1, budget)) if size > max(1, budget) else 0
            for first, size, budget in zip(sizes, current, budgets, strict=True)
        ]
        planned.append(plan_round(current, removed))
        current = [size - gone for size, gone in zip(current, removed, strict=True)]
    return tuple(planned)


def plan_round(sizes: Sequence[int], removed: Sequence[int]) -> MergeRound:
    """Return the round that takes `removed[s]` of the `sizes[s]` tokens of each segment, at most half of them."""
    starts = list(accumulate(sizes, initial=0))
    rows = list(accumulate((size - gone for size, gone in zip(sizes, removed, strict=True)), initial=0))
    none = torch.zeros(0, dtype=torch.int64)
    sources, destinations, ranks, destination_rows, others = [none], [none], [none], [none], [torch.stack([none, none])]
    source_ends, destination_ends = [0], [0]
    for start, size, gone, row in zip(starts, sizes, removed, rows, strict=False):
        if not gone:
            others.append(torch.stack([torch.arange(size) + start, torch.arange(size) + row]))
            continue
        even, odd = torch.arange(0, size, 2), torch.arange(1, size, 2)
        sources.append(even + start)
        destinations.append(odd + start)
        left = len(even) - gone
        ranks.append(torch.cat([torch.full((gone,), -1), row + torch.arange(left)]))
        destination_rows.append(row + left + torch.arange(len(odd)))
        source_ends.append(source_ends[-1] + len(even))
        destination_ends.append(destination_ends[-1] + len(odd))
    return MergeRound(
        sources=torch.cat(sources),
        destinations=torch.cat(destinations),
        source_offsets=tuple(source_ends),
        destination_offsets=tuple(destination_ends),
        removed=tuple(gone for gone in removed if gone),
        rank_to_row=torch.cat(ranks),
        destination_rows=torch.cat(destination_rows),
        others=torch.cat(others, dim=1),
        rows=rows[-1],
    )


def merge_rounds(values: Tensor, rounds: Sequence[MergeRound]) -> Merged:
    """Merge `values [tokens, dim]`, packed as the rounds say.

    In each round every even token looks for the odd one with the highest cosine; those with the highest of these cosines
    join it, and it becomes the mean of itself and all that join, whatever these stand for. The other even tokens come
    first, by falling cosine, then the odd ones.
    """
    device = values.device
    values = values.to(torch.float32)
    groups = positions = torch.arange(len(values), device=device)
    done = []
    for planned in rounds:
        sources, destinations = to_device(planned.sources, device), to_device(planned.destinations, device)
        ends, destination_ends = planned.source_offsets, planned.destination_offsets
        partner, cosine = bipartite_match(values[sources], values[destinations], ends, destination_ends)
        counts = [end - begin for begin, end in pairwise(ends)]
        first = torch.tensor([ends[:-1], destination_ends[:-1]]).repeat_interleave(torch.tensor(counts), dim=1)
        starts, partner_starts = to_device(first, device)
        by_rank = segmented_topk(cosine, ends, counts, order="score") + starts
        destination_rows = to_device(planned.destination_rows, device)
        row = to_device(planned.rank_to_row, device)
        row = torch.where(row < 0, destination_rows[(partner + partner_starts)[by_rank]], row)
        becomes = torch.empty(len(values), dtype=torch.int64, device=device)
        becomes[sources[by_rank]] = row
        becomes[destinations] = destination_rows
        unmerged, their_rows = to_device(planned.others, device)
        becomes[unmerged] = their_rows
        # A destination names its row; a source only where it has it to itself.
        kept = torch.empty(planned.rows, dtype=torch.int64, device=device)
        kept[becomes[sources]] = positions[sources]
        kept[destination_rows] = positions[destinations]
        kept[their_rows] = positions[unmerged]
        positions, groups = kept, becomes[groups]
        values, _ = merge_scatter(values, becomes, None, planned.rows)
        done.append((becomes, planned.rows))
    return Merged(values, positions, groups, tuple(done))


def merging(merged: Merged) -> Callable[[Tensor], Tensor]:
    """Return the function that merges other values of the same tokens alike, `[tokens, dim]` to fp32 `[rows, dim]`."""

    def merge(values: Tensor) -> Tensor:
        values = values.to(torch.float32)
        for becomes, rows in merged.rounds:
            values, _ = merge_scatter(values, becomes.to(values.device), None, rows)
        return values

    return merge
