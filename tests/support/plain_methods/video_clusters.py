"""What the video methods share, in plain loops and fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Vector = Tensor


def cosine(one: Vector, other: Vector) -> float:
    """Cosine of two vectors, 0 where one is zero."""
    return float(one @ other / max(float(one.norm() * other.norm()), 1e-12))


def mean(vectors: Sequence[Vector]) -> Vector:
    """Mean of vectors."""
    return torch.stack(list(vectors)).mean(0)


def highest(scores: Sequence[float], count: int) -> list[int]:
    """Places of the highest scores, ascending; the lowest index of equal ones."""
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


def peaks(values: Sequence[Vector], neighbours: int, count: int) -> list[int]:
    """The density peaks of some vectors, ascending."""
    apart = [[float((a - b).square().mean()) for b in values] for a in values]
    density = [math.exp(-sum(sorted(row)[:neighbours]) / neighbours) for row in apart]
    scores = []
    for i, row in enumerate(apart):
        denser = [row[j] for j in range(len(row)) if (density[j], -j) > (density[i], -i)]
        scores.append(density[i] * math.sqrt(min(denser) if denser else max(map(max, apart))))
    return highest(scores, count)


def nearest(value: Vector, centres: Sequence[Vector]) -> int:
    """The nearest of some vectors."""
    apart = [float((value - centre).square().sum()) for centre in centres]
    return apart.index(min(apart))


def in_proportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Split a total in proportion to sizes, none above its own, by the largest remainders; for totals up to their sum."""
    exact = [total * size / sum(sizes) for size in sizes] if sum(sizes) else [0.0] * len(sizes)
    whole = [math.floor(share + 1e-9) for share in exact]
    order = sorted(range(len(sizes)), key=lambda part: (-round(exact[part] - whole[part], 9), part))
    for part in order[: total - sum(whole)]:
        whole[part] += 1
    return whole


def within_room(total: int, sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Split a total in proportion to sizes; what a part has no room for goes to the others."""
    total, full = min(total, sum(room)), set[int]()
    while True:
        left = total - sum(room[part] for part in full)
        others = [part for part in range(len(sizes)) if part not in full]
        weight = sum(sizes[part] for part in others)
        over = {part for part in others if left * sizes[part] > room[part] * weight}
        if not over:
            shares = dict(zip(others, in_proportion(left, [sizes[part] for part in others]), strict=True))
            return [room[part] if part in full else shares[part] for part in range(len(sizes))]
        full |= over


def spread(total: int, parts: int) -> list[int]:
    """Split a total evenly, the larger shares at the middles of equal steps."""
    rest = total % parts
    larger = {(2 * step + 1) * parts // (2 * rest) for step in range(rest)}
    return [total // parts + (part in larger) for part in range(parts)]


def scenes(alike: Sequence[float], cuts: set[int]) -> list[range]:
    """The frames of every scene."""
    ends = sorted({cut + 1 for cut in cuts} | {len(alike) + 1})
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
