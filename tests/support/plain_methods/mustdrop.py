"""MustDrop's filter in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.plain_language import PlainRow
from support.plain_tower import plain_image


def mustdrop_filter(
    pictures: list[Tensor],
    layers: tuple[int, ...],
    thresholds: tuple[float, float],
    key_rate: float,
    counts: tuple[int, ...] = (),
) -> Callable[[Any, int, PlainRow], None]:
    """Return the cuts behind `layers`.

    Args:
        pictures: pixels of the row's images, `[1, 3, height, width]` each.
        layers: layers behind which tokens are filtered.
        thresholds: of all attention, and of the highest of a word.
        key_rate: share of the tokens that are protected.
        counts: tokens that stay behind each of `layers`; without them the thresholds tell.
    """

    def cut(model: Any, at: int, row: PlainRow) -> None:
        if at == 0:
            row.memory["keys"] = [protected(model, picture, key_rate) for picture in pictures]
        if at - 1 not in layers:
            return
        assert row.attention is not None
        new = []
        for image, own in enumerate(row.images):
            seen = row.attention.mean(0)
            words = [[float(seen[word, token]) for token in own] for word in row.text_after(image)]
            sums = [sum(word[place] for word in words) for place in range(len(own))]
            highest = [max(word[place] for word in words) for place in range(len(own))]
            strength = [
                max(share / (thresholds[0] * sum(sums)), top / thresholds[1])
                for share, top in zip(sums, highest, strict=True)
            ]
            keys = [number in row.memory["keys"][image] for number in row.numbers[image]]
            if counts:
                order = sorted(range(len(own)), key=lambda place: (not keys[place], -strength[place]))
                stay = sorted(order[: counts[layers.index(at - 1)]])
            else:
                stay = [place for place in range(len(own)) if keys[place] or strength[place] >= 1]
            named = [own[place] for place in stay]
            new.append((named, row.hidden[named]))
        row.replace(new, compact=False)

    return cut


@torch.no_grad()
def protected(model: Any, picture: Tensor, rate: float) -> list[int]:
    """The tokens that the CLS token attends to most in the last layer of the tower."""
    seen = plain_image(model, picture).looked_at(-1).mean(0).tolist()
    return sorted(range(len(seen)), key=lambda token: -seen[token])[: math.ceil(rate * len(seen))]
