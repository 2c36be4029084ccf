"""CrossGET in plain loops."""

from __future__ import annotations

import math

import torch

from support.plain_methods.reduced_tower import PlainBlock, PlainReduction


def crossget(variant: str):
    """The reduction with one of the ways to find what matters."""

    def reduce(block: PlainBlock) -> PlainReduction:
        count = len(block.hidden)
        keys = block.key.mean(1)
        attention = block.attention.mean(0)
        if variant == "matching":
            importance = [0.0] * count
        elif not block.cross:
            importance = attention.mean(0).tolist()
        elif variant == "clip":
            importance = torch.cosine_similarity(keys, block.query.mean(1)[-1:], dim=1).tolist()
        else:
            importance = (attention[:-1].mean(0) + attention[-1]).tolist()
        free = [
            token
            for token in range(count)
            if not (block.cls and token == 0) and not (block.cross and token == count - 1)
        ]
        cosine = torch.full((count, count), -torch.inf)
        for one in free:
            for other in free:
                if one != other:
                    cosine[one, other] = torch.cosine_similarity(keys[one], keys[other], dim=0)
        # Two nearest neighbours of each other tie, and the tie is the sort's of the CPU.
        unit = torch.nn.functional.normalize(keys, dim=-1)[None]
        same = (unit @ unit.transpose(1, 2))[0].masked_fill(cosine == -torch.inf, -torch.inf)
        order = same.amax(-1)[None].argsort(dim=-1, descending=True)[0].tolist()
        rank = {token: number for number, token in enumerate(order)}
        priority = {}
        for token in free:
            lower = [float(cosine[token, other]) for other in free if rank[other] > rank[token]]
            if lower:
                priority[token] = importance[token] - max(lower)
        going = sorted(priority, key=lambda token: priority[token])[: block.remove]
        staying = [token for token in range(count) if token not in going]
        heavy = [size * value for size, value in zip(block.sizes, block.hidden, strict=True)]
        sums, sizes = list(heavy), list(block.sizes)
        back = torch.zeros(count, len(staying))
        for source in going:
            target = max((token for token in staying if token in free), key=lambda token: float(cosine[source, token]))
            one, two = math.exp(importance[source]), math.exp(importance[target])
            own, other = one / (one + two), two / (one + two)
            sums[target] = sums[target] + 2 * own * heavy[source] + (2 * other - 1) * heavy[target]
            sizes[target] += block.sizes[source]
            back[source, staying.index(target)] = 1.0
        for number, token in enumerate(staying):
            back[token, number] = 1.0
        values = torch.stack([sums[token] / sizes[token] for token in staying])
        return PlainReduction(values, back, staying, [sizes[token] for token in staying])

    return reduce
