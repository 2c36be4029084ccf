"""VisPruner in plain loops."""

from __future__ import annotations

import torch

from support.plain_tower import PlainImage


def vispruner(image: PlainImage, keep: int, rho: float = 0.5) -> list[int]:
    """Return the kept patches of one image of at most 576."""
    layer = image.feature_layer if image.cls else len(image.attention) - 1
    scores = image.looked_at(layer).mean(0).tolist()
    features = torch.nn.functional.normalize(image.states[image.cls :], dim=-1)
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    important = int(keep * rho)
    kept, rest = ranked[:important], ranked[important:]
    while len(rest) > keep - important:
        even, odd = rest[::2], rest[1::2]
        nearest = {token: max(float(features[token] @ features[other]) for other in odd) for token in even}
        falling = sorted(even, key=lambda token: (-nearest[token], -token))
        rest = falling[min(8, len(rest) - (keep - important)) :] + odd
    return sorted(kept + rest)
