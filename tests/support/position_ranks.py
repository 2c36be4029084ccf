"""How much a token's place tells, with plain loops."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from support.host_parts import decoder


def ranked(model: Any, positions: Tensor, columns: Tensor) -> list[int]:
    """Return the better of a token's two places, by mean cosine and by mean sine."""
    frequencies = decoder(model).rotary_emb.inv_freq.tolist()
    axes = (
        positions[-3:, columns].T.tolist()
        if positions.ndim == 2
        else [[place] for place in positions[columns].tolist()]
    )
    places = []
    for function in (math.cos, math.sin):
        means = [
            sum(function(place * frequency) for place in own for frequency in frequencies) / len(own) for own in axes
        ]
        # Tokens that are as good as equal may stand in either order.
        places.append([sum(other > mean + 1e-4 for other in means) for mean in means])
    return [min(pair) for pair in zip(*places, strict=True)]
