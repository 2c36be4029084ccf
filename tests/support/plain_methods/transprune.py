"""TransPrune in plain loops."""

from __future__ import annotations

import torch

from support.plain_methods.plain_layers import PlainRow


def transprune(row: PlainRow, cuts: dict[int, list[int]], layers: int) -> None:
    """Take tokens out of `row`.

    Args:
        row: the prompt at its entry.
        cuts: by layer the tokens that each image keeps from its input on.
        layers: layers of the language model.
    """
    first, moved = min(cuts), {}
    for layer in range(layers):
        if layer in cuts:
            _, attention = row.attention(layer)
            kept = []
            for image, count in enumerate(cuts[layer]):
                places, words = row.alive(image).tolist(), row.text_after(image).tolist()
                variation = torch.tensor([moved[int(row.columns[place])] for place in places])
                seen = torch.tensor(
                    [sum(attention[:, word, place].mean() for word in words) / len(words) for place in places]
                )
                scores = variation / variation.sum() + seen / seen.sum()
                kept.append(torch.tensor(sorted(places[pick] for pick in scores.topk(count).indices)))
            columns = [row.columns[places] for places in kept]
            for image, mine in enumerate(columns):
                row.keep(image, torch.isin(row.columns, mine).nonzero().flatten())
        row.run(layer)
        if first - 1 <= layer < max(cuts):
            for before, after in row.traces[-1].modules:
                turns = [1 - float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(before, after, strict=True)]
                weights = torch.tensor(turns).softmax(0)
                for column, a, b, weight in zip(row.columns.tolist(), before, after, weights, strict=True):
                    moved[column] = moved.get(column, 0.0) + float(b.norm() / a.norm() * weight)
