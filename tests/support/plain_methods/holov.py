"""HoloV in plain loops."""

from __future__ import annotations

import math

import torch

from support.plain_tower import PlainImage


def holov(image: PlainImage, keep: int, mode: str = "code", beta: float | None = None) -> list[int]:
    """Return the kept patches of one image; what a run cannot hold goes to the others, the largest remainder first."""
    total, features = len(image.features), torch.nn.functional.normalize(image.features, dim=-1)
    attention = image.looked_at(image.feature_layer).mean(0)
    beta = beta if beta is not None else 0.09 if mode == "code" else 1.0
    number = max(1, min(total, int(1024 / 576 * total / keep)))
    runs, start = [], 0
    for index in range(number):
        length = total // number + (index < total % number)
        runs.append(list(range(start, start + length)))
        start += length
    weights, ranking = [], attention.clone() if mode == "code" else torch.zeros(total)
    for run in runs:
        variance = []
        for token in run:
            cosines = [0.0 if other == token else float(features[token] @ features[other]) for other in run]
            mean = sum(cosines) / max(1, len(run) - 1)
            variance.append(sum((cosine - mean) ** 2 for cosine in cosines) / max(1, len(run) - 1))
        scaled = [1000 * float(attention[token]) for token in run]
        scale = (sum(scaled) / len(run)) / (sum(variance) / len(run) + 1e-6)
        scores = [a + beta * scale * v for a, v in zip(scaled, variance, strict=True)]
        weights.append(sum(scores) / len(run) if len(run) > 1 else float(attention[run[0]]))
        if mode == "paper":
            ranking[run] = torch.tensor(scores)
    shares = [weight / (sum(weights) + 1e-6) for weight in weights]
    quota = [math.floor(share * keep) for share in shares]
    heaviest = sorted(range(number), key=lambda index: -shares[index])
    left = keep - sum(quota)
    for place in range(left):
        quota[heaviest[place if mode == "code" else 0]] += 1
    held = [min(q, len(run)) for q, run in zip(quota, runs, strict=True)]
    over = keep - sum(held)
    free = [len(run) - h for run, h in zip(runs, held, strict=True)]
    extra = share_out(over, [s if mode == "code" else s * f for s, f in zip(shares, free, strict=True)], free)
    kept = []
    for run, h, more in zip(runs, held, extra, strict=True):
        kept += sorted(run, key=lambda token: (-float(ranking[token]), token))[: h + more]
    return sorted(kept)


def share_out(total: int, weights: list[float], free: list[int]) -> list[int]:
    """Share `total` in proportion, a full part leaving its rest to the others, fractions by the largest remainder."""
    exact, open_parts, left = [0.0] * len(free), [i for i in range(len(free)) if free[i]], float(total)
    while open_parts and left > 1e-9:
        level = left / sum(weights[i] for i in open_parts)
        full = [i for i in open_parts if level * weights[i] > free[i]]
        if not full:
            for i in open_parts:
                exact[i] = level * weights[i]
            break
        for i in full:
            exact[i] = float(free[i])
            left -= free[i]
            open_parts.remove(i)
    whole = [math.floor(value) for value in exact]
    order = sorted(range(len(free)), key=lambda i: -(exact[i] - whole[i] if whole[i] < free[i] else -1.0))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole
