"""Zero-TPrune in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from support.plain_methods.reduced_tower import PlainBlock, PlainReduction


def zero_tprune(redundant: int, rounds: int, variance: tuple[float, float] = (0.01, 0.7)):
    """The dropping of tokens behind a block."""

    def votes(attention: Tensor, cls: bool, number: int) -> Tensor:
        heads = []
        for rows in attention.double():
            start = torch.ones(len(rows), dtype=torch.float64)
            if cls:
                start[0] = len(rows) ** 0.5
            current = start / start.sum()
            for _ in range(number):
                current = sum(vote * row for vote, row in zip(current, rows, strict=True))
            heads.append(current)
        spread = [float(((vote * len(vote) - 1) ** 2).mean()) for vote in heads]
        used = [vote for vote, value in zip(heads, spread, strict=True) if variance[0] <= value <= variance[1]] or heads
        return (sum(vote**2 for vote in used) / len(used)) ** 0.5

    def reduce(block: PlainBlock) -> PlainReduction:
        first, count = int(block.cls), len(block.hidden)
        keys = block.key.mean(1)
        importance = votes(block.attention, block.cls, 1)
        order = sorted(range(first, count), key=lambda token: (-float(importance[token]), token))
        half = len(order) // 2
        best = {}
        for token in order[len(order) - half :]:
            others = order[: len(order) - half]
            best[token] = max(float(torch.cosine_similarity(keys[token], keys[other], dim=0)) for other in others)
        similar = min(redundant, block.remove, half)
        dropped = sorted(best, key=lambda token: -best[token])[:similar]
        left = [token for token in range(count) if token not in dropped]
        rest = block.attention[:, left][:, :, left]
        importance = votes(rest / rest.sum(-1, keepdim=True), block.cls, rounds)
        number = count - first - block.remove
        chosen = sorted(range(first, len(left)), key=lambda place: (-float(importance[place]), place))[:number]
        kept = [*range(first), *sorted(left[place] for place in chosen)]
        back = torch.zeros(count, len(kept))
        for output, token in enumerate(kept):
            back[token, output] = 1.0
        return PlainReduction(block.hidden[kept], back, kept, [1.0] * len(kept))

    return reduce
