"""CDPruner in plain loops, by determinants."""

from __future__ import annotations

import torch
from torch import Tensor

from support.plain_tower import PlainImage


def cdpruner(image: PlainImage, keep: int, words: Tensor, relevance: Tensor | None = None) -> list[int]:
    """Return the kept patches of one image: each pick makes the determinant of the chosen largest.

    Without `relevance [patches]` it is the cosine to the mean of `words`.
    """
    tokens = image.features
    if relevance is None:
        relevance = torch.stack([torch.cosine_similarity(token, words.mean(0), dim=0) for token in tokens])
    scaled = ((relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())).double()
    unit = torch.nn.functional.normalize(tokens, dim=-1).double()
    matrix = scaled[:, None] * (unit @ unit.T) * scaled
    kept: list[int] = []
    for _ in range(keep):
        values = []
        for token in range(len(tokens)):
            chosen = [*kept, token]
            values.append(-1.0 if token in kept else float(torch.linalg.det(matrix[chosen][:, chosen])))
        kept.append(values.index(max(values)))
    return sorted(kept)
