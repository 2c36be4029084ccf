"""The greedy choices as their definition has them: all chosen rows again at every step."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_oracle(
    similarity: Tensor, k: int, seed: int | None = None, total: bool = False, weights: Tensor | None = None
) -> list[int]:
    """Return `k` picks of max-min (or max-sum) by a similarity matrix `[tokens, tokens]`, never a token twice."""
    tokens = similarity.shape[0]
    if seed is None and weights is not None:
        seed = int(weights.argmax())
    elif seed is None:
        seed = int(similarity.masked_fill(torch.eye(tokens, dtype=torch.bool), -torch.inf).amax(1).argmin())
    picks = [seed]
    while len(picks) < k:
        rows = similarity[picks]
        score = rows.sum(0) if total else rows.amax(0)
        if weights is not None:
            score = -weights * (1 - score)
        score[picks] = torch.inf
        picks.append(int(score.argmin()))
    return picks[:k]


def tied_features(tokens: int, dim: int = 16) -> Tensor:
    """Rows of ones and minus ones: norms and cosines are exact in fp16, and most distances are tied."""
    return torch.randint(0, 2, (tokens, dim)) * 2.0 - 1.0


def exact_cosines(features: Tensor) -> Tensor:
    """Cosines of `tied_features` in float64."""
    features = features.double()
    return features @ features.T / features.shape[1]
