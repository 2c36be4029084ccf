"""Queries and keys of a decoder layer, made with the layer's own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError

from ..rotation import rotate


def rotary_row(attention: nn.Module, states: Tensor, embeddings: tuple[Tensor, Tensor], row: Tensor) -> Tensor:
    """Project nothing, rotate one token per batch row: `states [batch, heads * dim]` to `[batch, 1, heads, dim]`."""
    batch = states.shape[0]
    rows = torch.arange(batch, device=states.device)
    cos, sin = (table.expand(batch, *table.shape[1:])[rows, row][:, None] for table in embeddings)
    return rotate(attention, states[:, None], (cos, sin), "q_norm")


def cached_keys(cache: Any, layer: int, count: int) -> Tensor | None:
    """Return the first `count` keys of a layer's cache, `[batch, count, kv_heads, dim]`, or None if `count` is 0.

    Raises:
        UnsupportedCallError: the layer keeps them in another form.
    """
    if count == 0:
        return None
    keys = cache.layers[layer].keys
    if keys.ndim != 4 or keys.shape[2] < count:
        raise UnsupportedCallError(
            f"Images behind a {type(cache.layers[layer]).__name__} of {count} entries: methods inside the language model "
            "score with its keys, which it does not give back. Use the default dynamic cache, or a method before the first layer."
        )
    return keys[:, :, :count].transpose(1, 2)
