"""Caches of earlier layers cut to the tokens that a prefill leaves in its last ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from vlmprune.errors import UnsupportedCallError

from .state import LayerGroup, PrunedCacheState


def check_can_trim(cache: Any, method: str) -> None:
    """Raise UnsupportedCallError if entries cannot be taken out of the layers of `cache`; None is none."""
    if cache is None:
        return
    kinds = {type(layer) for layer in cache.layers} or {
        getattr(cache, "layer_class_to_replicate", None) or DynamicLayer
    }
    refused = sorted(kind.__name__ for kind in kinds if kind not in (DynamicLayer, StaticLayer))
    if refused:
        raise UnsupportedCallError(
            f"{method!r} cuts the caches of earlier layers to the tokens that are left at the end, which a {refused[0]} does not "
            "allow; allowed: the default dynamic cache, or a static one."
        )


def trim_cache(cache: Any, state: PrunedCacheState, first: int, as_last: bool = False) -> PrunedCacheState:
    """Take out of the layers from `first` on what the last layers do not hold, and return what the cache then is.

    Each layer keeps the positions that its keys were rotated with: tokens that follow count from those.

    Args:
        cache: the cache at the end of a prefill; changed.
        state: what it holds.
        first: 0-based layer.
        as_last: whether tokens that follow count from the positions of the last layers in all layers from `first` on, though
            the keys were rotated with others.
    """
    last, groups = state.layer_groups[-1], []
    ends = [group.first_layer for group in state.layer_groups[1:]] + [len(cache.layers)]
    for group, end in zip(state.layer_groups, ends, strict=True):
        begin = max(first, group.first_layer)
        if group is last or begin >= end:
            groups.append(group)
            continue
        if group.first_layer < first:
            groups.append(group)
        source = _entries(group, last)
        for layer in range(begin, end):
            _gather(cache.layers[layer], source)
        trimmed = replace(
            group, first_layer=begin, cache_length=last.cache_length, valid=last.valid, columns=last.columns
        )
        if as_last:
            trimmed = replace(trimmed, removed=last.removed, lowered=last.lowered)
        groups.append(trimmed)
    return replace(state, layer_groups=tuple(groups))


def _entries(group: LayerGroup, last: LayerGroup) -> Tensor:
    """Return which entry of `group` each of `last` is, int64 `[batch, entries]`; 0 at padding."""
    columns = group.columns
    numbers = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    of_column = columns.new_zeros(columns.shape[0], group.lowered.shape[1] + 1)
    of_column.scatter_(1, torch.where(columns >= 0, columns, group.lowered.shape[1]), numbers)
    return of_column.gather(1, last.columns.clamp(min=0).to(columns.device))


def _gather(layer: Any, source: Tensor) -> None:
    index = source.to(layer.keys.device)[:, None, :, None]
    kept = [
        states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
        for states in (layer.keys, layer.values)
    ]
    if isinstance(layer, StaticLayer):
        for states, held in zip((layer.keys, layer.values), kept, strict=True):
            states[:, :, : index.shape[2]] = held
        layer.cumulative_length.fill_(index.shape[2])
        return
    layer.keys, layer.values = kept
