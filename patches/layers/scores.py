"""Queries and keys of a decoder layer, made with the layer's own modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError, UnsupportedMethodError

from ..families.wrappers import without_wrappers
from ..parts import Part, missing_parts

MODEL_PARTS = (Part("layers"), Part("rotary_emb"), Part("config"))
"""What dropping between layers relies on in the language model."""
LAYER_PARTS = (
    Part(arguments=("attention_mask", "position_ids", "position_embeddings", "past_key_values")),
    Part("input_layernorm"),
    *(Part(f"self_attn.{name}") for name in ("q_proj", "k_proj", "head_dim", "scaling")),
)
"""What it relies on in every layer from the first that is read on."""


def check_decoder(language_model: nn.Module, layers: Iterable[int], method: str) -> None:
    """Raise UnsupportedMethodError unless the decoder layers have the parts that dropping inside them needs."""
    name = type(language_model).__name__
    missing = missing_parts(language_model, MODEL_PARTS)
    if missing:
        raise UnsupportedMethodError(f"{method!r} drops tokens inside the language model: {'; '.join(missing)}.")
    config: Any = language_model.config
    for layer in layers:
        module: Any = without_wrappers(language_model.layers[layer])  # type: ignore[index, arg-type]
        attention = getattr(module, "self_attn", None)
        missing = missing_parts(module, LAYER_PARTS)
        if not missing and _rotary_function(module.self_attn) is None:
            missing = [f"the module of {type(module.self_attn).__name__} has no `apply_rotary_pos_emb`"]
        if missing:
            raise UnsupportedMethodError(
                f"{method!r} scores with the projections of layer {layer} and passes it fewer tokens: {'; '.join(missing)}."
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
    return rotate_heads(attention, heads, embeddings)


def rotate_heads(attention: nn.Module, heads: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to `heads [batch, tokens, heads, dim]`."""
    heads = heads.transpose(1, 2)
    function: Any = _rotary_function(attention)
    rotated: Tensor = function(heads[:, :1], heads, *embeddings)[1].transpose(1, 2)
    return rotated


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


def _rotary_function(attention: nn.Module) -> Any:
    for cls in type(attention).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    return None
