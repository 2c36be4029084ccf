"""ZOO-Prune in plain loops, with whole differences of the projector's output."""

from __future__ import annotations

import torch

from support.plain_tower import PlainImage
from vlmprune.methods.input.zooprune import random_directions


def zooprune(image: PlainImage, keep: int, m: int = 64, h: float = 0.0, sketch: int | None = None) -> list[int]:
    """Return the kept patches of one image; in double, with a small step for the limit."""
    states = image.states[image.cls :].double()
    projector = image.project
    dtype = next(projector.parameters()).dtype
    projector.double()
    try:
        directions = random_directions(m, states.shape[1], 0)
        step, lengths = h or 1e-5, []
        for direction in directions.double():
            change = (projector(states + step * direction) - projector(states - step * direction)) / (2 * step)
            lengths.append(change.norm(dim=-1))
    finally:
        projector.to(dtype)
    scores = torch.stack(lengths).mean(0)
    weights = ((scores - scores.min()) / (scores.max() - scores.min())).tolist()
    features = torch.nn.functional.normalize(image.features.double(), dim=-1)
    cosines = (features @ features.T).tolist()
    kept = [max(range(len(weights)), key=lambda token: weights[token])]
    while len(kept) < keep:
        left = [token for token in range(len(weights)) if token not in kept]
        kept.append(max(left, key=lambda token: weights[token] * (1 - max(cosines[token][other] for other in kept))))
    return sorted(kept)
