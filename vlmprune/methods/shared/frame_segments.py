"""A video as runs of frames that show the same scene, and tokens spread over its frames."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.methods.baselines.uniform import even_steps


def neighbour_cosines(frames: Tensor) -> Tensor:
    """Return the cosine of every row of `frames [frames, dim]` and the next one, fp32 `[frames - 1]`."""
    unit = normalize(frames.float(), dim=-1)
    return (unit[:-1] * unit[1:]).sum(-1)


def lengths_between(cuts: Iterable[int], frames: int) -> tuple[int, ...]:
    """Return the lengths of the segments of `frames` frames that end behind the frames `cuts`."""
    ends = sorted({cut + 1 for cut in cuts} | {frames})
    return tuple(end - begin for begin, end in pairwise([0, *ends]))


def even_shares(total: int, parts: int) -> list[int]:
    """Return `total` split evenly over `parts`, the larger shares evenly spaced; sums to `total`."""
    share, rest = divmod(total, parts)
    larger = set(even_steps(parts, rest).tolist()) if rest else set()
    return [share + (part in larger) for part in range(parts)]


def segment_starts(lengths: Iterable[int], device: torch.device) -> Tensor:
    """Return whether each frame is the first of its segment, bool `[frames]`."""
    first = [place == 0 for length in lengths for place in range(length)]
    return torch.tensor(first, device=device)
