"""What MMTok's tokens cover, and the choice by it."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.coverage_from_values import coverage_from_values


def coverage_rows(
    tokens: Tensor, features: Tensor, words: Tensor, alpha: float, text_temperature: float, vision_temperature: float
) -> Tensor:
    """Return what every token covers of the words and of the tokens, fp32 `[words + tokens, tokens]`.

    Args:
        tokens: `[tokens, dim]` visual tokens.
        features: `[tokens, tower_dim]`, the same before the projector.
        words: `[words, dim]`, embeddings of the text.
        alpha: weight of the tokens beside the words.
        text_temperature: of the softmax over tokens of a word's cosines.
        vision_temperature: of the softmax over tokens of a token's cosines.
    """
    tokens, features, words = (_unit(values) for values in (tokens, features, words))
    of_words = (words @ tokens.T / text_temperature).softmax(-1) / max(1, len(words))
    of_tokens = (features @ features.T / vision_temperature).softmax(-1) / len(features)
    return torch.cat([of_words, alpha * of_tokens])


def coverage_order(rows: Tensor, count: int, excluded: Tensor | None = None) -> Tensor:
    """Return `count` tokens in the order in which they are chosen, each with the highest gain in what the chosen cover.

    Args:
        rows: `coverage_rows`.
        count: number of tokens.
        excluded: bool `[tokens]`, tokens to take after all others (padding); they are still covered.
    """
    return coverage_from_values(rows.T, count, excluded=excluded)


def padding_patches(width: int, height: int, target: int, patch: int, overlap: bool = False) -> Tensor:
    """Return the patches inside the bars that make a picture of `width` x `height` pixels a square, int64, ascending.

    Args:
        width: of the picture before padding.
        height: of the picture before padding.
        target: side of the square in pixels.
        patch: side of a patch in pixels.
        overlap: whether patches that lie in a bar only partly count.
    """
    side = target // patch
    kept = round(min(width, height) * target / max(width, height))
    before = (target - kept) // 2
    after = target - kept - before
    first, last = (-(-bar // patch) if overlap else bar // patch for bar in (before, after))
    line = torch.arange(side)
    padded = (line < first) | (line >= side - last)
    grid = padded[:, None].expand(side, side) if width > height else padded.expand(side, side)
    return grid.flatten().nonzero().flatten() if width != height else torch.zeros(0, dtype=torch.int64)


def _unit(values: Tensor) -> Tensor:
    # In the values' own dtype, as in the official code: rounded to bf16 here, other tokens are chosen.
    least = max(1e-8, torch.finfo(values.dtype).tiny)
    return (values / values.norm(dim=-1, keepdim=True).clamp(min=least)).float()
