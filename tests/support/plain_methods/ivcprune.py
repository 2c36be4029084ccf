"""IVC-Prune in plain loops, from the values that the unpatched model makes."""

from __future__ import annotations

from math import cos, exp, sin, sqrt

from torch import Tensor


def ivcprune(
    values: Tensor, image: list[int], text: list[int], positions: Tensor, frequencies: list[float], counts: list[int]
) -> list[int]:
    """Return the kept tokens of one image of one unpadded row, similarities over the image alone.

    Args:
        values: `[tokens, kv_heads, head_dim]` of the layer before the cut.
        image: columns of the image.
        text: columns of the text that asks.
        positions: `[axes, tokens]`.
        frequencies: inverse frequencies of the rotary positions.
        counts: seeds, tokens by cosine (and by sine), tokens that stay.
    """
    heads, width = values.shape[1:]
    rows = values.double().tolist()

    def similarity(column: int) -> list[float]:
        total = [0.0] * len(image)
        for head in range(heads):
            logits = [
                sum(a * b for a, b in zip(rows[column][head], rows[key][head], strict=True)) / sqrt(width)
                for key in image
            ]
            peak = max(logits)
            exps = [exp(logit - peak) for logit in logits]
            for token, value in enumerate(exps):
                total[token] += value / sum(exps) / heads
        return total

    def mean(columns: list[int]) -> list[float]:
        maps = [similarity(column) for column in columns]
        return [sum(each) / len(maps) for each in zip(*maps, strict=True)]

    def best(scores: list[float], count: int) -> list[int]:
        return sorted(range(len(scores)), key=lambda token: -scores[token])[:count]

    seed_count, position_count, total = counts
    seeds = best(mean(text), seed_count)
    scores = mean(text + [image[seed] for seed in seeds])
    first = set(seeds)
    for function in (cos, sin):
        per_token = [
            sum(function(float(axis[column]) * frequency) for axis in positions for frequency in frequencies)
            for column in image
        ]
        # Means that differ by roundings are ties.
        first |= set(best([round(value, 4) for value in per_token], position_count))
    kept = best([scores[token] if token in first else -1.0 for token in range(len(image))], min(len(first), total))
    rest = [token for token in best(scores, len(image)) if token not in first]
    return sorted(kept + rest[: total - len(kept)])
