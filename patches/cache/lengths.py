"""How many entries the layers of a cache hold, where some of them keep a state in place of entries."""

from __future__ import annotations

from typing import Any


def entries(cache: Any, layer: int = 0) -> int:
    """Return the entries of a layer's cache; of the first layer that has any where this one keeps a state, or none of its own."""
    held = cache.layers[layer]
    if not hasattr(held, "get_seq_length"):
        held = next(other for other in cache.layers if hasattr(other, "get_seq_length"))
    return int(held.get_seq_length())
