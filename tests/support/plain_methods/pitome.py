"""PiToMe in plain loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support.plain_methods.reduced_tower import PlainBlock, PlainReduction, from_groups


def pitome(variant_of, margin: float, keys: bool = False, by_size: bool = False):
    """The reduction; `variant_of(block, blocks)` names how a block matches."""

    def reduce(block: PlainBlock) -> PlainReduction:
        metric = block.key.mean(1) if keys else block.hidden
        groups = pitome_groups(
            metric,
            block.remove,
            margin * (1 - block.block / block.blocks),
            variant_of(block.block, block.blocks),
            block.cls,
        )
        weights = block.sizes if by_size else [1.0] * len(metric)
        values, back = from_groups(block.hidden, groups, weights)
        sizes = [sum(block.sizes[token] for token in group) for group in groups]
        return PlainReduction(values, back, [group[0] for group in groups], sizes)

    return reduce


def pitome_groups(metric: Tensor, remove: int, margin: float, variant: str, cls: bool) -> list[list[int]]:
    """The groups in the official order, destinations first."""

    def cosine(one: int, other: int) -> float:
        return float(torch.cosine_similarity(metric[one], metric[other], dim=0))

    count, first = len(metric), int(cls)
    if variant == "bsm":
        into = list(range(1, count, 2))
        best = {}
        for token in range(0, count, 2):
            if token or not cls:
                best[token] = max((cosine(token, other), -other) for other in into)
        going = sorted(best, key=lambda token: (-best[token][0], token))[:remove]
        staying = [token for token in sorted(best, key=lambda token: (-best[token][0], token)) if token not in going]
        staying = [0, *sorted(staying)] if cls else staying
        return [[token] for token in staying] + [
            [token, *(source for source in going if best[source][1] == -token)] for token in into
        ]
    energy = {}
    for token in range(first, count):
        terms = []
        for other in range(first, count):
            gap = cosine(token, other) - margin
            terms.append(gap if gap > 0 else math.exp(gap) - 1)
        energy[token] = sum(terms) / len(terms)
    order = sorted(energy, key=lambda token: (-energy[token], token))
    if variant == "pitome":
        going, into, staying = order[: 2 * remove : 2], order[1 : 2 * remove : 2], order[2 * remove :]
        best = {source: max(into, key=lambda token: cosine(source, token)) for source in going}
    else:
        some, into = order[::2], order[1::2]
        best = {source: max(into, key=lambda token: cosine(source, token)) for source in some}
        going = sorted(some, key=lambda token: -cosine(token, best[token]))
        going, staying = going[:remove], going[remove:]
    groups = [[token] for token in [*range(first), *staying]]
    return groups + [[token, *(source for source in going if best[source] == token)] for token in into]
