"""What must be remembered of a pruned KV cache, for as long as the cache lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError

_ATTRIBUTE = "_vlmprune_state"


@dataclass(frozen=True, eq=False)
class PrunedCacheState:
    """How a cache relates to the sequence that the caller believes to be in it.

    Attributes:
        caller_length: tokens of the caller's sequence at the end of the latest prefill.
        cache_length: entries of the cache at that moment.
        valid: bool `[batch, cache_length]`, false at padding; None if there is none.
        removed: int64 `[batch, 1]`, how far positions after the prefill move down.
    """

    caller_length: int
    cache_length: int
    valid: Tensor | None
    removed: Tensor

    def caller_past(self, cache: Any) -> int:
        """Return how many tokens of the caller's sequence the cache stands for now."""
        return self.caller_length + int(cache.get_seq_length()) - self.cache_length

    def check_batch(self, batch: int) -> None:
        """Raise UnsupportedCallError if the cache was made with another number of rows."""
        if self.removed.shape[0] != batch:
            raise UnsupportedCallError(
                f"A pruned cache of {self.removed.shape[0]} rows was continued with {batch} rows; allowed: the same rows."
            )

    def valid_columns(self, cache: Any, attention_mask: Tensor | None, new_columns: int) -> Tensor | None:
        """Return the mask `[batch, entries before + new_columns]` in cache columns, or None if nothing is masked.

        Args:
            cache: the cache before this call's tokens are added.
            attention_mask: the caller's mask `[batch, caller_past + new_columns]`, or None.
            new_columns: tokens of this call.
        """
        expected = self.caller_past(cache) + new_columns
        if attention_mask is not None and attention_mask.shape[1] != expected:
            raise UnsupportedCallError(
                f"attention_mask has {attention_mask.shape[1]} columns; the pruned cache stands for {expected - new_columns} "
                f"tokens of the full sequence and {new_columns} are new, so {expected} are needed."
            )
        if attention_mask is None and self.valid is None:
            return None
        batch, later = self.removed.shape[0], expected - self.caller_length
        ones = torch.ones(batch, later, dtype=torch.bool, device=self.removed.device)
        tail = ones if attention_mask is None else attention_mask[:, self.caller_length :].to(ones)
        head = self.valid
        if head is None:
            head = torch.ones(batch, self.cache_length, dtype=torch.bool, device=tail.device)
        return torch.cat([head, tail], dim=1)


def cache_state(cache: Any) -> PrunedCacheState | None:
    """Return the state of a pruned cache; None for a cache that was never pruned, or was reset since."""
    state = getattr(cache, _ATTRIBUTE, None)
    if state is None or int(cache.get_seq_length()) < state.cache_length:
        return None
    return state  # type: ignore[no-any-return]


def set_cache_state(cache: Any, state: PrunedCacheState) -> None:
    """Attach the state to the cache object, with which it lives, is copied and dies."""
    setattr(cache, _ATTRIBUTE, state)
