"""What must be remembered of a pruned KV cache, for as long as the cache lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError

_ATTRIBUTE = "_vlmprune_state"


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Neighbouring layers whose caches hold the same tokens.

    Attributes:
        first_layer: 0-based layer at which the group begins.
        cache_length: entries of these layers' caches at the end of the latest prefill.
        valid: bool `[batch, cache_length]`, false at padding; None if there is none.
        removed: int64 `[batch, 1]`, how far positions after the prefill move down in these layers.
    """

    first_layer: int
    cache_length: int
    valid: Tensor | None
    removed: Tensor

    def extended(self, later: Tensor | None, count: int) -> Tensor | None:
        """Return the mask `[batch, cache_length + count]` once `count` later tokens follow, or None if nothing is masked.

        Args:
            later: the caller's mask of those tokens, bool `[batch, count]`, or None.
        """
        if later is None and self.valid is None:
            return None
        batch, device = self.removed.shape[0], self.removed.device
        head = (
            self.valid
            if self.valid is not None
            else torch.ones(batch, self.cache_length, dtype=torch.bool, device=device)
        )
        tail = later if later is not None else torch.ones(batch, count, dtype=torch.bool, device=device)
        return torch.cat([head, tail.to(head)], dim=1)


@dataclass(frozen=True, eq=False)
class PrunedCacheState:
    """How a cache relates to the sequence that the caller believes to be in it.

    Attributes:
        caller_length: tokens of the caller's sequence at the end of the latest prefill.
        layer_groups: groups of layers with equal caches, from layer 0 up.
    """

    caller_length: int
    layer_groups: tuple[LayerGroup, ...]

    @property
    def cache_length(self) -> int:
        """Entries of the first layer's cache at the end of the latest prefill."""
        return self.layer_groups[0].cache_length

    @property
    def removed(self) -> Tensor:
        """How far positions after the prefill move down in the first layer, int64 `[batch, 1]`."""
        return self.layer_groups[0].removed

    def group(self, layer: int) -> LayerGroup:
        """Return the group that holds `layer`."""
        return next(group for group in reversed(self.layer_groups) if group.first_layer <= layer)

    def caller_past(self, cache: Any) -> int:
        """Return how many tokens of the caller's sequence the cache stands for now."""
        return self.caller_length + int(cache.get_seq_length()) - self.cache_length

    def check_batch(self, batch: int) -> None:
        """Raise UnsupportedCallError if the cache was made with another number of rows."""
        if self.removed.shape[0] != batch:
            raise UnsupportedCallError(
                f"A pruned cache of {self.removed.shape[0]} rows was continued with {batch} rows; allowed: the same rows."
            )

    def check_columns(self, attention_mask: Tensor | None, expected: int, new_columns: int) -> None:
        """Raise UnsupportedCallError unless the caller's mask covers `expected` tokens, of which `new_columns` are new."""
        if attention_mask is not None and attention_mask.shape[1] != expected:
            raise UnsupportedCallError(
                f"attention_mask has {attention_mask.shape[1]} columns; the pruned cache stands for {expected - new_columns} "
                f"tokens of the full sequence and {new_columns} are new, so {expected} are needed."
            )

    def valid_columns(self, cache: Any, attention_mask: Tensor | None, new_columns: int) -> Tensor | None:
        """Return the mask `[batch, entries before + new_columns]` of the first layer, or None if nothing is masked.

        Args:
            cache: the cache before this call's tokens are added.
            attention_mask: the caller's mask `[batch, caller_past + new_columns]`, or None.
            new_columns: tokens of this call.
        """
        expected = self.caller_past(cache) + new_columns
        self.check_columns(attention_mask, expected, new_columns)
        later = None if attention_mask is None else attention_mask[:, self.caller_length :]
        return self.layer_groups[0].extended(later, expected - self.caller_length)


def cache_state(cache: Any) -> PrunedCacheState | None:
    """Return the state of a pruned cache; None for a cache that was never pruned, or was reset since."""
    state = getattr(cache, _ATTRIBUTE, None)
    if state is None or int(cache.get_seq_length()) < state.cache_length:
        return None
    return state


def set_cache_state(cache: Any, state: PrunedCacheState) -> None:
    """Attach the state to the cache object, with which it lives, is copied and dies."""
    setattr(cache, _ATTRIBUTE, state)
