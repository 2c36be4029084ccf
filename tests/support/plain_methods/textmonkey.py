"""TextMonkey's filter in plain loops."""

from __future__ import annotations

import torch

from support.plain_tower import PlainImage


def textmonkey(image: PlainImage, keep: int) -> list[int]:
    """Return the kept patches of one image."""
    features, total = image.features, len(image.features)
    scores = [-1.0] * total
    for token in range(total - 1):
        cosines = [
            float(torch.cosine_similarity(features[token], features[later], dim=0)) for later in range(token + 1, total)
        ]
        scores[token] = max(cosines)
    return sorted(sorted(range(total), key=lambda token: scores[token])[:keep])
