"""MCTF in plain loops."""

from __future__ import annotations

import torch

from support.plain_methods.reduced_tower import PlainBlock, PlainReduction, from_groups


def mctf(one_step_ahead: bool, pooling: str = "attention"):
    """The fusion with the paper's criteria."""

    def reduce(block: PlainBlock) -> PlainReduction:
        count = len(block.hidden)
        received = block.attention.mean((0, 1)).tolist()
        smallest = min(block.sizes)

        def score(one: int, other: int) -> float:
            alike = (float(torch.cosine_similarity(block.hidden[one], block.hidden[other], dim=0)) + 1) / 2
            least = min(received)
            value = alike * (least / received[one] * least / received[other]) ** (1 / 20)
            if any(size != 1.0 for size in block.sizes):
                value *= (smallest / block.sizes[one] * smallest / block.sizes[other]) ** (1 / 40)
            return value

        even, odd = list(range(int(block.cls) * 2, count, 2)), list(range(1, count, 2))
        first = block.remove // 2
        best = {one: max((score(one, other), -other) for other in odd) for one in even}
        going = sorted(even, key=lambda one: (-best[one][0], one))[:first]
        stays = [one for one in even if one not in going]
        back_best = {other: max((score(one, other), -one) for one in stays) for other in odd}
        order = sorted(odd, key=lambda other: (-back_best[other][0], other))
        going_odd, stays_odd = order[: block.remove - first], order[block.remove - first :]
        head = [0] if block.cls else []
        groups = {token: [token] for token in [*head, *stays, *stays_odd]}
        home = {other: -back_best[other][1] for other in going_odd}
        for other in going_odd:
            groups[home[other]].append(other)
        for one in going:
            into = -best[one][1]
            groups[home.get(into, into)].append(one)
        outputs = list(groups.values())
        largest = max(block.sizes)
        if pooling == "attention":
            weights = [share * size / largest for share, size in zip(received, block.sizes, strict=True)]
        else:
            weights = list(block.sizes)
        values, back = from_groups(block.hidden, outputs, weights)
        attention = None
        if one_step_ahead:
            shares = torch.zeros(len(outputs), count)
            for number, group in enumerate(outputs):
                total = sum(weights[token] for token in group)
                for token in group:
                    shares[number, token] = weights[token] / total
            attention = shares @ block.attention @ back
        sizes = [sum(block.sizes[token] for token in group) for group in outputs]
        return PlainReduction(values, back, [group[0] for group in outputs], sizes, attention)

    return reduce
