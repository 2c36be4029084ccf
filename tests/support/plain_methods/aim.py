"""AIM in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from support.plain_methods.plain_layers import PlainRow


def aim_merge(features: Tensor, budget: int) -> tuple[list[int], Tensor]:
    """Return the places that merged tokens of one image take, in position order, and their values."""
    tokens = [(place, values.double()) for place, values in enumerate(features)]
    total, number = len(tokens), 0
    while len(tokens) > budget:
        number += 1
        removed = min(max(1, total >> number), len(tokens) // 2, len(tokens) - budget)
        even, odd = tokens[::2], tokens[1::2]
        matches = []
        for source, (_, values) in enumerate(even):
            cosines = [float(torch.cosine_similarity(values, other, dim=0)) for _, other in odd]
            best = cosines.index(max(cosines))
            matches.append((-cosines[best], source, best))
        matches.sort()
        joined: dict[int, list[Tensor]] = {}
        for _, source, best in matches[:removed]:
            joined.setdefault(best, []).append(even[source][1])
        merged = [
            (place, torch.stack([values, *joined.get(target, [])]).mean(0))
            for target, (place, values) in enumerate(odd)
        ]
        tokens = [even[source] for _, source, _ in matches[removed:]] + merged
    tokens.sort(key=lambda token: token[0])
    return [place for place, _ in tokens], torch.stack([values for _, values in tokens]).to(features.dtype)


def aim_pagerank(row: PlainRow, cuts: dict[int, list[int]], layers: int) -> None:
    """Take tokens out of `row`; `cuts` has by layer the tokens that each image keeps from its input on."""
    for layer in range(layers):
        if layer in cuts:
            logits = row.traces[-1].logits
            tokens = logits.shape[-1]
            votes = torch.zeros(tokens)
            for head in logits:
                weights = (head / 0.1).masked_fill(~torch.ones(tokens, tokens).tril().bool(), -torch.inf).softmax(-1)
                current = torch.full((tokens,), 1 / tokens)
                for _ in range(5):
                    current = current @ weights
                votes += current**2
            best = []
            for image, count in enumerate(cuts[layer]):
                places = row.alive(image)
                best.append(row.columns[places[votes[places].topk(min(count, len(places))).indices]])
            for image, mine in enumerate(best):
                row.keep(image, torch.isin(row.columns, mine).nonzero().flatten())
        row.run(layer)
