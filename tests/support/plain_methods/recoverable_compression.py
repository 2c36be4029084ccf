"""Recoverable Compression in plain loops, with scikit-learn's outliers."""

from __future__ import annotations

import torch
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor

from support.plain_tower import PlainImage


def outliers(values: Tensor, neighbours: int) -> float:
    """The share of values that scikit-learn calls outliers."""
    found = LocalOutlierFactor(min(neighbours, len(values) - 1)).fit_predict(values.double().numpy()[:, None])
    return float((found == -1).sum()) / len(values)


def recoverable_compression(
    image: PlainImage, words: Tensor, mode: str = "code", similarity: Tensor | None = None
) -> tuple[list[int], Tensor]:
    """Return the kept patches of one uncut image and what the language model gets in their places, in position order."""
    last, total, states = len(image.attention) - 1, len(image.features), image.states[1:]
    query, key = (values[last].flatten(1) for values in (image.queries, image.keys))
    attention = (query[0] @ key.T * key.shape[1] ** -0.5).softmax(-1)[1:]
    if similarity is None:
        similarity = torch.cosine_similarity(image.features, words.mean(0)[None], dim=-1) * 768**-0.5
    number = int(total * outliers(attention, 20))
    by_attention = sorted(range(total), key=lambda token: -float(attention[token]))[:number]
    recovered = similarity.clone()
    recovered[by_attention] = similarity.min()
    number = int((total - len(by_attention)) * outliers(recovered, 20))
    left = [token for token in range(total) if token not in by_attention]
    by_text = sorted(left, key=lambda token: -float(similarity[token]))[:number]
    main = sorted(by_attention + by_text)
    if not main:
        main = [int(attention.argmax())]
    rest = [token for token in range(total) if token not in main]
    number = int((states.shape[1] if mode == "code" else len(rest)) * outliers(attention[rest], 10))
    centres = sorted(rest, key=lambda token: -float(attention[token]))[: min(number, len(rest) - 1)]
    values = {token: image.features[token] for token in main}
    keys = key[1:]
    for centre in centres:
        scores = {}
        for place, token in enumerate(rest):
            if token != centre:
                mine, other = (keys[rest.index(centre)], keys[place]) if mode == "code" else (keys[centre], keys[token])
                cosine = float(torch.cosine_similarity(mine, other, dim=0))
                scores[token] = cosine + 50 * float(similarity[token])
        near = sorted(scores, key=lambda token: -scores[token])[:32]
        values[centre] = image.project(states[centre] + sum(attention[token] * states[token] for token in near))
    others = [token for token in rest if token not in centres]
    if centres:
        values[others[-1]] = image.project(sum(attention[token] * states[token] for token in others))
    kept = sorted(values)
    return kept, torch.stack([values[token] for token in kept])
