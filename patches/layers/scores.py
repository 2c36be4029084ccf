"""Queries and keys of a decoder layer, made with the layer's own modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedMethodError


def check_decoder(language_model: nn.Module, layers: Iterable[int], method: str) -> None:
    """Raise UnsupportedMethodError unless the decoder layers have the parts that dropping inside them needs."""
    name = type(language_model).__name__
    for part in ("layers", "rotary_emb", "config"):
        if not hasattr(language_model, part):
            raise UnsupportedMethodError(f"{method!r} drops tokens inside the language model; {name} has no `{part}`.")
    config: Any = language_model.config
    for layer in layers:
        module: Any = language_model.layers[layer]  # type: ignore[index]
        attention = getattr(module, "self_attn", None)
        missing = [
            part
            for part, found in (
                ("input_layernorm", hasattr(module, "input_layernorm")),
                ("self_attn.q_proj", hasattr(attention, "q_proj")),
                ("self_attn.k_proj", hasattr(attention, "k_proj")),
                ("apply_rotary_pos_emb", attention is not None and _rotary_function(attention) is not None),
            )
            if not found
        ]
        if missing:
            raise UnsupportedMethodError(
                f"{method!r} scores with the projections of layer {layer}; {type(module).__name__} has no {', '.join(missing)}."
            )
        kinds = getattr(config, "layer_types", None)
        kind = kinds[layer] if kinds else "full_attention"
        if kind != "full_attention" or (not kinds and getattr(config, "sliding_window", None)):
            raise UnsupportedMethodError(
                f"{method!r} cannot drop tokens at layer {layer} of {name}: its attention is {kind!r} with a window; "
                "allowed: full attention."
            )
        if getattr(attention, "attn_logit_softcapping", None):
            raise UnsupportedMethodError(
                f"{method!r} cannot score with layer {layer} of {name}: its logits are soft-capped."
            )


def rotary_row(attention: nn.Module, states: Tensor, embeddings: tuple[Tensor, Tensor], row: Tensor) -> Tensor:
    """Project nothing, rotate one token per batch row: `states [batch, heads * dim]` to `[batch, 1, heads, dim]`."""
    batch = states.shape[0]
    rows = torch.arange(batch, device=states.device)
    cos, sin = (table.expand(batch, *table.shape[1:])[rows, row][:, None] for table in embeddings)
    return rotate(attention, states[:, None], (cos, sin), "q_norm")


def rotate(attention: nn.Module, states: Tensor, embeddings: tuple[Tensor, Tensor], norm: str) -> Tensor:
    """Split projected `states [batch, tokens, heads * dim]` in heads, normalise and rotate: `[batch, tokens, heads, dim]`."""
    heads = states.unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, norm):
        heads = getattr(attention, norm)(heads)
    heads = heads.transpose(1, 2)
    function: Any = _rotary_function(attention)
    return function(heads[:, :1], heads, *embeddings)[1].transpose(1, 2)


def cached_keys(cache: Any, layer: int, count: int) -> Tensor | None:
    """Return the first `count` keys of a layer's cache, `[batch, count, kv_heads, dim]`, or None if `count` is 0."""
    if count == 0:
        return None
    return cache.layers[layer].keys[:, :, :count].transpose(1, 2)


def _rotary_function(attention: nn.Module) -> Any:
    for cls in type(attention).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    return None
