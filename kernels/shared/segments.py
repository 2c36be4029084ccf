"""Ragged segments of a packed tensor: `offsets` [segments + 1] says where each begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def host_integers(values: Sequence[int] | Tensor) -> list[int]:
    """Return `values` as Python ints. A tensor on a GPU costs one host sync."""
    return values.tolist() if isinstance(values, Tensor) else list(map(int, values))


def check_offsets(offsets: Sequence[int] | Tensor, length: int, name: str = "offsets") -> list[int]:
    """Return the offsets as Python ints, which begin at 0, never fall and end at `length`; ValueError otherwise."""
    bounds = host_integers(offsets)
    if not bounds or bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"{name} must begin with 0 and end with the number of rows {length}; got {_short(bounds)}.")
    if bounds != sorted(bounds):
        raise ValueError(f"{name} must never fall; got {_short(bounds)}.")
    return bounds


def check_counts(k: Sequence[int] | Tensor, bounds: Sequence[int]) -> list[int]:
    """Return the picks per segment as Python ints, each from 0 to its segment's length; ValueError otherwise."""
    counts = host_integers(k)
    if len(counts) != len(bounds) - 1:
        raise ValueError(f"k must have one count per segment: got {len(counts)} counts for {len(bounds) - 1} segments.")
    for segment, count in enumerate(counts):
        length = bounds[segment + 1] - bounds[segment]
        if not 0 <= count <= length:
            raise ValueError(f"k[{segment}] = {count} is not in 0..{length}, the length of segment {segment}.")
    return counts


def check_seeds(seeds: Sequence[int] | Tensor, bounds: Sequence[int]) -> list[int]:
    """Return the first pick of each segment as Python ints; ValueError where one lies outside its segment."""
    firsts = host_integers(seeds)
    lengths = [end - begin for begin, end in pairwise(bounds)]
    if len(firsts) != len(lengths):
        raise ValueError(f"seeds must have one index per segment: got {len(firsts)} for {len(lengths)} segments.")
    for segment, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        if length and not 0 <= first < length:
            raise ValueError(f"seeds[{segment}] = {first} is not in 0..{length - 1}, the tokens of segment {segment}.")
    return firsts


def running_starts(counts: Sequence[int]) -> list[int]:
    """Return where each segment's output begins, and the total as last entry."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Return `values` as an int64 tensor on `device` without waiting for the GPU."""
    host = torch.tensor(values, dtype=torch.int64)
    # A copy from pageable memory would make the host wait for all queued kernels.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _short(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 12 else f"{list(values[:6])}...{list(values[-3:])}"
