"""VidCom2 with an exact budget, in plain loops over frames and tokens."""

from __future__ import annotations

import math

from torch import Tensor


def vidcom2(video: Tensor, keep: float | int) -> list[int]:
    """Return the kept tokens of `video [frames, tokens, dim]`, ascending."""
    frames, tokens, dim = video.shape
    total = frames * tokens
    wanted = keep if isinstance(keep, int) else round(keep * total)
    target = min(total, max(frames, wanted))
    share = keep if isinstance(keep, float) else target / total
    rows = [row for frame in video.double().tolist() for row in frame]
    means = [sum(row[channel] for row in rows) / total for channel in range(dim)]
    spread = [sum((row[channel] - means[channel]) ** 2 for row in rows) for channel in range(dim)]
    channels = sorted(range(dim), key=lambda channel: (spread[channel], channel))[: max(1, dim // 2)]
    unit = []
    for row in rows:
        chosen = [row[channel] for channel in channels]
        length = max(math.sqrt(sum(value * value for value in chosen)), 1e-12)
        unit.append([value / length for value in chosen])

    def centre(some: list[list[float]]) -> list[float]:
        return [sum(values) / len(some) for values in zip(*some, strict=True)]

    def similarity(row: list[float], other: list[float]) -> float:
        squared = sum((one - two) ** 2 for one, two in zip(row, other, strict=True))
        return sum(math.exp(-squared / (2 * 2.0**power)) for power in (-3, -2, -1, 0, 1))

    whole = centre(unit)
    to_video = [similarity(row, whole) for row in unit]
    common = []
    for frame in range(frames):
        own = unit[frame * tokens : (frame + 1) * tokens]
        middle = centre(own)
        common += [similarity(row, middle) + to_video[frame * tokens + place] for place, row in enumerate(own)]
    unlike = [-sum(to_video[frame * tokens : (frame + 1) * tokens]) / tokens for frame in range(frames)]
    weights = [math.exp((score - max(unlike)) / 0.01) for score in unlike]
    weights = [weight / sum(weights) for weight in weights]
    chosen = set()
    for frame in range(frames):
        scale = min(1.0, share * (1 + weights[frame] - 1 / frames))
        count = min(tokens, max(1, round(scale * tokens)))
        mine = range(frame * tokens, (frame + 1) * tokens)
        chosen |= set(sorted(mine, key=lambda token: (common[token], token))[:count])
    order = sorted(range(total), key=lambda token: (token not in chosen, common[token], token))
    return sorted(order[:target])
