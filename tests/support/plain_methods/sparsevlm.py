"""SparseVLM in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.host_parts import decoder
from support.plain_language import PlainRow


def sparsevlm(
    layers: tuple[int, ...], tokens: tuple[int, ...], heads: int | None = None
) -> Callable[[Any, int, PlainRow], None]:
    """Return the cuts; with `heads` those of version 2."""

    def cut(model: Any, at: int, row: PlainRow) -> None:
        if at == 0:
            row.memory["raters"] = [raters(row, image) for image in range(len(row.images))]
        if at not in layers:
            return
        assert row.attention is not None
        new = []
        for image, own in enumerate(row.images):
            text = [row.text_after(image)[rater] for rater in row.memory["raters"][image]]
            kept = min(tokens[layers.index(at)], len(own) - 1)
            attention = row.attention[:, text][:, :, own]
            if heads is not None:
                attention = corrected(model, row, attention, text, own)
                sums = attention.sum((1, 2)).tolist()
                attention = attention[sorted(range(len(sums)), key=lambda head: -sums[head])[:heads]]
            relation = attention.mean((0, 1)).tolist()
            order = sorted(range(len(own)), key=lambda token: -relation[token])
            stay = [own[token] for token in sorted(order[:kept])]
            states = row.hidden[stay]
            if heads is None:
                dropped = len(own) - kept
                recycled = [own[token] for token in order[kept : kept + int(0.3 * dropped) + 1]]
                centres, means = clusters(row.hidden, recycled, int((int(0.3 * dropped) + 1) / 10) + 1)
                stay, states = stay + centres, torch.cat([states, means])
            new.append((stay, states))
        row.replace(new, compact=heads is None)

    return cut


def raters(row: PlainRow, image: int) -> list[int]:
    """The text tokens whose mean share over visual tokens is above the mean."""
    text, visual = row.text_after(image), row.images[image]
    shares = [0.0] * len(text)
    for token in visual:
        products = [float(row.entry[token] @ row.entry[word]) for word in text]
        largest = max(products)
        powers = [math.exp(product - largest) for product in products]
        for number, power in enumerate(powers):
            shares[number] += power / sum(powers) / len(visual)
    return [number for number, share in enumerate(shares) if share > sum(shares) / len(shares)]


def corrected(model: Any, row: PlainRow, attention: Tensor, text: list[int], own: list[int]) -> Tensor:
    """Attention divided by the product of rotated ones over the root of the width."""
    frequencies = decoder(model).rotary_emb.inv_freq
    width = 2 * len(frequencies)
    apart = row.positions[text][:, None] - row.positions[own]
    gravity = torch.stack([2 * torch.cos(apart * frequency) for frequency in frequencies]).sum(0) / width**0.5
    return attention / gravity


def clusters(hidden: Tensor, tokens: list[int], count: int) -> tuple[list[int], Tensor]:
    """Centres by falling score and the means of their clusters."""
    apart = [[float((hidden[a] - hidden[b]).norm()) / hidden.shape[1] ** 0.5 for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in apart]
    largest = max(map(max, apart))
    scores = []
    for a in range(len(tokens)):
        denser = [apart[a][b] for b in range(len(tokens)) if density[b] > density[a]]
        scores.append(density[a] * min(denser, default=largest))
    centres = sorted(range(len(tokens)), key=lambda a: -scores[a])[:count]
    members: list[list[int]] = [[] for _ in centres]
    for a in range(len(tokens)):
        nearest = centres.index(a) if a in centres else min(range(count), key=lambda c: apart[a][centres[c]])
        members[nearest].append(tokens[a])
    return [tokens[centre] for centre in centres], torch.stack([hidden[group].mean(0) for group in members])
