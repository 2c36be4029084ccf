"""EVS in plain loops over tokens."""

from __future__ import annotations

import math

from torch import Tensor


def evs(video: Tensor, keep: float | int) -> list[int]:
    """Return the kept tokens of `video [frames, tokens, dim]`, ascending."""
    rows = video.double().tolist()
    frames, tokens = len(rows), len(rows[0])
    change = []
    for frame in range(frames):
        for place in range(tokens):
            if frame == 0:
                change.append(255.0)
                continue
            now, before = rows[frame][place], rows[frame - 1][place]
            lengths = [max(math.sqrt(sum(value * value for value in row)), 1e-8) for row in (now, before)]
            dot = sum(one * other for one, other in zip(now, before, strict=True))
            change.append(1 - dot / (lengths[0] * lengths[1]))
    total = frames * tokens
    wanted = keep if isinstance(keep, int) else round(keep * total)
    count = min(total, max(tokens, wanted))
    return sorted(sorted(range(total), key=lambda token: (-change[token], token))[:count])
