"""MMTok in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from support.plain_tower import PlainImage


def mmtok(image: PlainImage, keep: int, words: Tensor, alpha: float = 0.5) -> list[int]:
    """Return the kept patches of one image, given the embeddings of the words."""
    tokens, states = image.features, image.states[image.cls :]
    total = len(tokens)
    rows = []
    for word in words:
        cosines = torch.stack([torch.cosine_similarity(word, token, dim=0) for token in tokens])
        rows.append((cosines / 0.02).softmax(0) / len(words))
    for state in states:
        cosines = torch.stack([torch.cosine_similarity(state, other, dim=0) for other in states])
        rows.append(alpha * (cosines / 0.2).softmax(0) / total)
    matrix = torch.stack(rows).double().T.tolist()
    best, kept = [0.0] * len(rows), []
    for _ in range(keep):
        gains = [
            -1.0
            if token in kept
            else sum(max(value - cover, 0.0) for value, cover in zip(matrix[token], best, strict=True))
            for token in range(total)
        ]
        kept.append(gains.index(max(gains)))
        best = [max(value, cover) for value, cover in zip(matrix[kept[-1]], best, strict=True)]
    return sorted(kept)
