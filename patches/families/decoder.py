"""What dropping tokens between decoder layers, and reading their attention, relies on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedMethodError

from ..parts import Part, missing_parts
from ..rotation import rotary_function, rotate
from .wrappers import without_wrappers

MODEL_PARTS = (Part("layers"), Part("rotary_emb"), Part("config"))
"""What dropping between layers relies on in the language model."""
LAYER_PARTS = (
    Part(arguments=("attention_mask", "position_ids", "position_embeddings", "past_key_values")),
    Part("input_layernorm"),
    *(Part(f"self_attn.{name}") for name in ("q_proj", "k_proj", "head_dim", "scaling")),
)
"""What it relies on in every layer from the first that is read on."""

_LAYER_ARGUMENTS = frozenset(
    {
        *(
            "self",
            "hidden_states",
            "attention_mask",
            "position_ids",
            "position_embeddings",
            "past_key_values",
            "kwargs",
        ),
        *("use_cache", "output_attentions", "output_router_logits"),
    }
)
_TOLERANCE = 0.03
_STATES = ("linear_attention", "conv")


def check_decoder(language_model: nn.Module, layers: Iterable[int], method: str) -> None:
    """Raise UnsupportedMethodError unless the decoder layers have the parts that dropping inside them needs."""
    gap = decoder_gap(language_model, layers)
    if gap is not None:
        raise UnsupportedMethodError(
            f"{method!r} scores with the projections of decoder layers and passes them fewer tokens: {gap}."
        )


def reading_gap(language_model: nn.Module, layers: Iterable[int], positions: Callable[[Tensor], Tensor]) -> str | None:
    """Return where a decoder layer does not attend as it would be read, in words, or None.

    Every layer's attention is run on a few made-up tokens, and what it gives the last of them is computed again from its
    projections, norms, rotary positions and scale. The two must agree.

    Args:
        language_model: a decoder without a `decoder_gap`.
        layers: its layers.
        positions: turns position ids `[1, tokens]` into those that its rotary embedding takes.
    """
    model: Any = language_model
    for layer in layers:
        attention: Any = without_wrappers(model.layers[layer]).self_attn
        try:
            error = _reading_error(model, attention, positions)
        except Exception as caught:
            # Whatever a class does that nobody knew of: it is not read.
            return f"layer {layer} of {type(model).__name__} cannot be read: {type(caught).__name__}: {caught}"
        if not error < _TOLERANCE:
            return (
                f"the attention of layer {layer} of {type(model).__name__} is another than its projections, norms, rotary "
                f"positions and scale give (off by {error:.0%})"
            )
        unknown = (
            inspect.signature(type(without_wrappers(model.layers[layer])).forward).parameters.keys() - _LAYER_ARGUMENTS
        )
        if unknown:
            return f"layer {layer} of {type(model).__name__} takes {', '.join(sorted(unknown))}, which cannot be placed"
    return None


def _reading_error(model: Any, attention: Any, positions: Callable[[Tensor], Tensor]) -> float:
    weight = attention.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    width = int(model.config.hidden_size)
    hidden = torch.randn(1, 6, width, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        embeddings = model.rotary_emb(hidden, positions(torch.arange(6, device=hidden.device)[None]))
        # To the last token all others are visible, whatever the backend makes of no mask.
        given: Tensor = attention.forward(hidden_states=hidden, position_embeddings=embeddings, attention_mask=None)[0][
            :, -1
        ]
        query = rotate(attention, attention.q_proj(hidden), embeddings, "q_norm")[:, -1:].float()
        key = rotate(attention, attention.k_proj(hidden), embeddings, "k_norm").float()
        value = attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).float()
        repeats = query.shape[2] // key.shape[2]
        key, value = (states.repeat_interleave(repeats, 2) for states in (key, value))
        weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) * float(attention.scaling)).softmax(-1)
        heads = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
        project = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
        read = project(heads.to(weight.dtype))[:, -1]
    return float((given - read).float().norm() / given.float().norm())


def decoder_gap(language_model: nn.Module, layers: Iterable[int]) -> str | None:
    """Return why tokens cannot be dropped at `layers`, in words, or None."""
    name = type(language_model).__name__
    missing = missing_parts(language_model, MODEL_PARTS)
    if missing:
        return "; ".join(missing)
    config: Any = language_model.config
    for layer in layers:
        module: Any = without_wrappers(language_model.layers[layer])  # type: ignore[index, arg-type]
        kinds = getattr(config, "layer_types", None)
        kind = kinds[layer] if kinds else "full_attention"
        if kind in _STATES:
            return f"layer {layer} of {name} is {kind!r}: it has one state of all tokens before, and no keys of each"
        attention = getattr(module, "self_attn", None)
        missing = missing_parts(module, LAYER_PARTS)
        if not missing and rotary_function(module.self_attn) is None:
            missing = [f"the module of {type(module.self_attn).__name__} has no `apply_rotary_pos_emb`"]
        if missing:
            return f"layer {layer} of {name}: {'; '.join(missing)}"
        if kind != "full_attention" or (not kinds and getattr(config, "sliding_window", None)):
            return f"the attention of layer {layer} of {name} is {kind!r} with a window; allowed: full attention"
        if getattr(attention, "attn_logit_softcapping", None):
            return f"the logits of layer {layer} of {name} are soft-capped"
    return None
