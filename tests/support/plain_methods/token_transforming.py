"""The soft merge that stands for Token Transforming, in plain loops."""

from __future__ import annotations

import math

import torch

from support.plain_methods.reduced_tower import PlainBlock, PlainReduction


def token_transforming(tau: float, mode: str = "mass"):
    """The merge around the targets with the most attention."""

    def reduce(block: PlainBlock) -> PlainReduction:
        first, count = int(block.cls), len(block.hidden)
        attention = block.attention.mean(0)
        score = (attention[0] if block.cls else attention.mean(0)).tolist()
        tokens = list(range(first, count))
        targets = sorted(sorted(tokens, key=lambda token: (-score[token], token))[: len(tokens) - block.remove])
        matrix = torch.zeros(first + len(targets), count)
        for head in range(first):
            matrix[head, head] = 1.0
        for token in tokens:
            cosines = [
                float(torch.cosine_similarity(block.hidden[token], block.hidden[target], dim=0)) for target in targets
            ]
            shares = [math.exp(cosine / tau) for cosine in cosines]
            for row, share in enumerate(shares):
                whole = sum(shares) if mode == "mass" else 1.0
                matrix[first + row, token] = share / whole * block.sizes[token]
        rows = matrix.sum(1, keepdim=True)
        values = (matrix / rows) @ block.hidden
        if mode == "mass":
            sizes = [*block.sizes[:first], *rows[first:, 0].tolist()]
        else:
            matrix = matrix / rows
            even = sum(block.sizes[first:]) / len(targets)
            sizes = [*block.sizes[:first], *([even] * len(targets))]
        back = (matrix / matrix.sum(0)).T
        return PlainReduction(values, back, [*range(first), *targets], sizes)

    return reduce
