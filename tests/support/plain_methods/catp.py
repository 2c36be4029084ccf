"""CATP in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from support.plain_methods.plain_layers import PlainRow


def catp_first(features: Tensor, text: Tensor, budget: int, lambda1: float = 0.7) -> list[int]:
    """Return the kept tokens of one image, given the embeddings of its text."""
    mean = text.double().mean(0)
    similar = [
        [(float(torch.cosine_similarity(a, b, dim=0)) + 1) / 2 for b in features.double()] for a in features.double()
    ]
    to_text = [(float(torch.cosine_similarity(a, mean, dim=0)) + 1) / 2 for a in features.double()]
    covered, kept = [0.0] * len(features), []
    for _ in range(budget):
        gains = [
            -1.0
            if token in kept
            else sum(max(0.0, a - b) for a, b in zip(similar[token], covered, strict=True)) + lambda1 * to_text[token]
            for token in range(len(features))
        ]
        kept.append(gains.index(max(gains)))
        covered = [max(a, b) for a, b in zip(similar[kept[-1]], covered, strict=True)]
    return sorted(kept)


def catp_inside(row: PlainRow, layer: int, shots_left: int, query_left: int, layers: int, lambda2: float = 0.6) -> None:
    """Take tokens out of `row`, after `layer` and the next one."""
    *shots, query = range(len(row.images))
    for current in range(layers):
        if current == layer + 1 and shots:
            last = row.text_after(query)[-1]
            asked = torch.cat([row.alive(query), row.text_after(query)])
            mean = row.hidden[asked].mean(0)
            scored = []
            for shot in shots:
                for place in row.alive(shot).tolist():
                    now, before = (row.traces[-1 - back].attention[:, last, place].mean() for back in (0, 1))
                    near = torch.cosine_similarity(row.hidden[place], mean, dim=0)
                    scored.append((-float(max(now - before, torch.zeros(()))) - lambda2 * float(near), place))
            best = row.columns[[place for _, place in sorted(scored)[:shots_left]]]
            for shot in shots:
                row.keep(shot, torch.isin(row.columns, best).nonzero().flatten())
        if current == layer + 2:
            visual = torch.isin(row.columns, torch.cat(row.images))
            first, last_column = row.images[0].max(), row.images[query].min()
            words = (~visual & (row.columns > first) & (row.columns < last_column)).nonzero().flatten()
            context = torch.cat([words, *(row.alive(shot) for shot in shots)]) if shots else row.text_after(query)
            mean = row.hidden[context].mean(0)
            places = row.alive(query)
            near = torch.stack([torch.cosine_similarity(row.hidden[place], mean, dim=0) for place in places])
            row.keep(query, places[near.topk(min(query_left, len(places))).indices])
        row.run(current)
