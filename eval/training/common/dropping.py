"""Background tokens dropped at random before the language model, so that it does not lean on how much of it there is.

Which tokens show something is known from the scene; these are never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .language import slot_mask


@dataclass(frozen=True)
class Drop:
    """How often and how much of the background is dropped, batch by batch.

    Attributes:
        whole: share of batches that keep all tokens.
        bare: share of batches that keep exactly what shows something; the others keep a random part of the background.
        most: the largest such part.
        compact: share of batches with dropped tokens whose kept tokens are renumbered; in the others they keep their
            position ids.
    """

    whole: float = 0.25
    bare: float = 0.4
    most: float = 0.5
    compact: float = 0.5


def draw_kept(foreground: Tensor, drop: Drop | None, rng: np.random.Generator) -> tuple[Tensor, bool]:
    """Which tokens stay, bool `[batch, tokens]`, and whether they are renumbered; `foreground` has the same shape."""
    if drop is None or (kind := rng.random()) < drop.whole:
        return torch.ones_like(foreground), False
    share = 0.0 if kind < drop.whole + drop.bare else drop.most * rng.random()
    kept = foreground | torch.from_numpy(rng.random(tuple(foreground.shape)) < share)
    kept[:, 0] |= ~kept.any(1)
    return kept, bool(rng.random() < drop.compact)


def rows_used(kept: Tensor, pictures: int) -> int:
    """How many rows of a batch of several rounds are used: one round where all tokens are kept, which takes the longest."""
    return pictures if bool(kept.all()) else len(kept)


def kept_index(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `[batch, most kept]` of the kept tokens in order, padded with others, and which of them are no padding."""
    counts = kept.sum(1)
    index = kept.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    return index, torch.arange(index.shape[1]) < counts[:, None]


def gather_tokens(values: Tensor, index: Tensor) -> Tensor:
    """The tokens of `values [batch, tokens, ...]` at `index [batch, kept]`."""
    shape = index.shape + (1,) * (values.ndim - 2)
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))


def kept_mask(valid: Tensor, before: int, after: int, slots: int) -> Tensor:
    """Which positions see which, bool `[batch, 1, length, length]`: `slot_mask` without the padding among kept tokens.

    `valid [batch, kept]` says what is no padding; `before` and `after` are the tokens around the picture.
    """
    start = before + valid.shape[1] + after
    seen = slot_mask(start, slots)[0, 0] == 0
    there = torch.ones(len(valid), seen.shape[0], dtype=torch.bool)
    there[:, before : before + valid.shape[1]] = valid
    return ((seen & there[:, None]) | torch.eye(len(seen), dtype=torch.bool))[:, None]
