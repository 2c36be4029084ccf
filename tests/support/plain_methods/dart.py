"""DART in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from support.host_parts import decoder
from support.plain_language import PlainRow


def dart(layer: int, count: int, pivots: int = 4) -> Callable[[Any, int, PlainRow], None]:
    """Return the cut that leaves `count` tokens of each image at the input of `layer`."""

    def cut(model: Any, at: int, row: PlainRow) -> None:
        if at != layer:
            return
        assert row.keys is not None
        norms, states = row.keys.abs().sum((1, 2)).tolist(), decoder(model).norm(row.hidden)
        new = []
        for image, tokens in enumerate(row.images):
            kept = sorted(tokens, key=lambda token: -norms[token])[: min(pivots, count)]
            choosing = kept + sorted(row.text_after(image), key=lambda token: -norms[token])[:pivots]
            each, rest = divmod(count - len(kept), len(choosing))
            for turn, pivot in enumerate(list(choosing)):
                cosines = torch.nn.functional.cosine_similarity(states[pivot], states).tolist()
                free = [token for token in tokens if token not in kept]
                kept = kept + sorted(free, key=lambda token: cosines[token])[: each + (turn < rest)]
            new.append((sorted(kept), row.hidden[sorted(kept)]))
        row.replace(new, compact=False)

    return cut
