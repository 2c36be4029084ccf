"""HiPrune in plain loops."""

from __future__ import annotations

from support.plain_tower import PlainImage


def hiprune(image: PlainImage, keep: int, alpha: float = 0.1) -> list[int]:
    """Return the kept patches of one image; layer numbers as for a tower of few layers."""
    layers, total, side = len(image.attention), len(image.features), image.side
    shallow = image.received(max(1, layers * 3 // 8 if image.cls else layers // 2) - 1).tolist()
    deep = image.received(image.feature_layer).tolist()
    kept: set[int] = set()
    for anchor in sorted(range(total), key=lambda token: -shallow[token])[: min(round(keep * alpha / 5), keep // 5)]:
        for step in (0, -1, 1, -side, side):
            kept.add(min(max(anchor + step, 0), total - 1))
    for token in sorted(range(total), key=lambda token: -deep[token]):
        if len(kept) < keep:
            kept.add(token)
    return sorted(kept)
