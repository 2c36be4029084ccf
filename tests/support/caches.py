"""Caches of the kinds that `generate` can be given."""

from __future__ import annotations

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


def cache_lengths(cache: Any) -> list[int]:
    """Return the entries of every layer's cache."""
    return [layer.keys.shape[-2] for layer in cache.layers]
