"""Caches of the kinds that `generate` can be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, QuantizedLayer


class RoundedLayer(QuantizedLayer):
    """A quantised layer that needs no backend: it keeps all bits, in the places where quantised ones are kept."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.clone()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def rounded_cache(model: Any, residual: int = 4) -> Cache:
    """Return a quantised cache for `model` whose newest `residual` entries wait unquantised."""
    layers = model.config.get_text_config().num_hidden_layers
    return Cache(layers=[RoundedLayer(residual_length=residual) for _ in range(layers)])


def layers_with_keys(cache: Any) -> list[Any]:
    """Return the layers that have keys: not those of linear attention, nor those that share keys of others."""
    return [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor)]


def layer_keys(cache: Any) -> list[Tensor]:
    """Return the keys of the layers that have some."""
    return [layer.keys for layer in layers_with_keys(cache)]


def cache_lengths(cache: Any) -> list[int]:
    """Return the entries of every layer that holds keys."""
    return [keys.shape[-2] for keys in layer_keys(cache)]


def wanted_lengths(cache: Any, tokens: Sequence[int]) -> list[int]:
    """Return what `cache_lengths` must be where the sequence has so many tokens in each layer; windows hold the last ones."""
    return [
        min(count, layer.sliding_window - 1) if layer.is_sliding else count
        for layer, count in zip(cache.layers, tokens, strict=False)
        if isinstance(getattr(layer, "keys", None), Tensor)
    ]
