"""Queries and keys of a decoder layer: heads, their norms and rotary positions, by the functions of the layer's own module."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def rotate(attention: nn.Module, states: Tensor, embeddings: tuple[Tensor, Tensor], norm: str) -> Tensor:
    """Split projected `states [batch, tokens, heads * dim]` in heads, normalise and rotate: `[batch, tokens, heads, dim]`."""
    heads = states.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, norm):
        heads = getattr(attention, norm)(heads)
    return rotate_heads(attention, heads, embeddings)


def rotate_heads(attention: nn.Module, heads: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to `heads [batch, tokens, heads, dim]`."""
    heads = heads.transpose(1, 2)
    function: Any = rotary_function(attention)
    rotated: Tensor = function(heads[:, :1], heads, *embeddings)[1].transpose(1, 2)
    return rotated


def rotary_function(attention: nn.Module) -> Any:
    """Return the `apply_rotary_pos_emb` of the module that an attention class is from, or None."""
    for cls in type(attention).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    return None
