"""What must be remembered of a pruned KV cache, for as long as the cache lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError

from .lengths import entries
from .marks import AttentionMarks


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Neighbouring layers whose caches hold the same tokens.

    Attributes:
        first_layer: 0-based layer at which the group begins.
        cache_length: entries of these layers' caches at the end of the latest prefill.
        valid: bool `[batch, cache_length]`, false at padding; None if there is none.
        removed: int64 `[batch, 1]`, how far positions after the prefill move down in these layers.
        columns: int64 `[batch, cache_length]`, the caller's column that each entry stands for; -1 where it stands for none.
        lowered: int64 `[batch, caller_length]`, how far positions have moved down up to each of the caller's columns.
    """

    first_layer: int
    cache_length: int
    valid: Tensor | None
    removed: Tensor
    columns: Tensor
    lowered: Tensor

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

    def cropped(self, caller_length: int) -> LayerGroup:
        """Return the group once everything from the caller's column `caller_length` on is taken away.

        Rows that lose fewer entries than others keep them behind the mask.
        """
        left = (self.columns >= 0) & (self.columns < caller_length)
        width = int((left * torch.arange(1, self.cache_length + 1, device=left.device)).max()) if left.numel() else 0
        valid = left[:, :width] if self.valid is None else (left & self.valid)[:, :width]
        return replace(
            self,
            cache_length=width,
            valid=None if bool(valid.all()) else valid,
            removed=self.lowered[:, caller_length - 1 : caller_length],
            columns=self.columns[:, :width].masked_fill(~left[:, :width], -1),
            lowered=self.lowered[:, :caller_length],
        )

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> LayerGroup:
        """Return the group after `change` was made to the rows of its cache."""
        return replace(
            self,
            valid=None if self.valid is None else change(self.valid),
            removed=change(self.removed),
            columns=change(self.columns),
            lowered=change(self.lowered),
        )


class PositionShifts(NamedTuple):
    """How much higher positions are in some layer groups than in the first.

    Attributes:
        numbers: which of the shifts that differ is the group's, by its first layer; 0 is the first group's own.
        differing: how many differ.
        added: the shifts one below the other, int64 `[differing * batch, 1]`.
    """

    numbers: dict[int, int]
    differing: int
    added: Tensor


@dataclass(frozen=True, eq=False)
class PrunedCacheState:
    """How a cache relates to the sequence that the caller believes to be in it.

    Attributes:
        method: the name of the method that pruned it.
        caller_length: tokens of the caller's sequence at the end of the latest prefill.
        layer_groups: groups of layers with equal caches, from layer 0 up.
        highest: int64 `[batch, caller_length]`, the highest position id up to each of the caller's columns, before any moved
            down and padding apart; -1 where there is only padding.
        tail_advances: whether every token after the latest prefill has a higher position than the one before.
        packed: whether rows hold several prompts; such a cache cannot be continued.
        marks: what a method that changes attention knows of the prompts; None where there is no such method.
    """

    method: str
    caller_length: int
    layer_groups: tuple[LayerGroup, ...]
    highest: Tensor
    packed: bool = False
    tail_advances: bool = True
    marks: AttentionMarks | None = None

    @property
    def cache_length(self) -> int:
        """Entries of the first layer's cache at the end of the latest prefill."""
        return self.layer_groups[0].cache_length

    @property
    def removed(self) -> Tensor:
        """How far positions after the prefill move down in the first layer, int64 `[batch, 1]`."""
        return self.layer_groups[0].removed

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return self.highest.shape[0]

    @cached_property
    def last_positions(self) -> list[int]:
        """The highest position id of each row at the end of the latest prefill."""
        last: list[int] = self.highest[:, -1].tolist()
        return last

    @cached_property
    def later_groups(self) -> dict[int, LayerGroup]:
        """All groups but the first, by their first layer."""
        return {group.first_layer: group for group in self.layer_groups[1:]}

    @cached_property
    def shifts(self) -> PositionShifts:
        """How positions after the prefill differ between the layer groups."""
        removed = [group.removed.flatten().tolist() for group in self.layer_groups]
        firsts = [number for number, each in enumerate(removed) if removed.index(each) == number]
        return PositionShifts(
            numbers={
                group.first_layer: firsts.index(removed.index(each))
                for group, each in zip(self.layer_groups, removed, strict=True)
            },
            differing=len(firsts),
            added=torch.cat([self.removed - self.layer_groups[first].removed for first in firsts]),
        )

    def group(self, layer: int) -> LayerGroup:
        """Return the group that holds `layer`."""
        return next(group for group in reversed(self.layer_groups) if group.first_layer <= layer)

    def caller_past(self, cache: Any) -> int:
        """Return how many tokens of the caller's sequence the cache stands for now."""
        return self.caller_length + entries(cache) - self.cache_length

    def check_entries(self, cache: Any) -> int:
        """Return how many tokens the cache stands for now, as `caller_past`.

        Raises:
            UnsupportedCallError: layers were shortened or exchanged behind the cache's back, or prompts packed.
        """
        if self.packed:
            raise UnsupportedCallError(
                f"A cache pruned by {self.method!r} holds several prompts packed in one row, of which none can be continued; "
                "allowed: one prompt a row, or `use_cache=False`."
            )
        added = [entries(cache, group.first_layer) - group.cache_length for group in self.layer_groups]
        if added[0] < 0 or added.count(added[0]) != len(added):
            raise UnsupportedCallError(
                f"The layers of a cache pruned by {self.method!r} hold {added} entries more than its prefill left in them; "
                "they must have grown alike. Shorten it with `cache.crop(-tokens)`, never layer by layer."
            )
        return self.caller_length + added[0]

    def check_room(self, cache: Any, new_columns: int) -> None:
        """Raise UnsupportedCallError if a layer of a static cache has no room for `new_columns` more tokens."""
        for group in self.layer_groups:
            layer = cache.layers[group.first_layer]
            room = layer.get_max_length() if hasattr(layer, "get_seq_length") else -1
            if room < 0 or getattr(layer, "is_sliding", False):
                continue
            held = int(layer.get_seq_length())
            if room < held + new_columns:
                raise UnsupportedCallError(
                    f"The static cache has {room} places; layer {group.first_layer} holds {held} entries, {new_columns} tokens "
                    "are new. Make it longer (StaticCache(max_cache_len=...), or `max_cache_len` of the generation config)."
                )

    def check_positions(self, past: int, positions: Tensor, mask: Tensor | None) -> None:
        """Raise UnsupportedCallError if new tokens stand where the cache's tokens do.

        Args:
            past: tokens of the caller's sequence before this call.
            positions: position ids `[..., batch, columns]` of the new tokens, as the caller counts them.
            mask: the caller's mask `[batch, caller_past + columns]`, or None.
        """
        columns = positions.shape[-1]
        self.check_batch(positions.shape[-2])
        self.check_columns(mask, past + columns, columns)
        lowest = positions[-3:].amin(0) if positions.ndim == 3 else positions
        # Mostly they lie above what the last token can have had, whatever the mask says.
        added = past - self.caller_length if self.tail_advances else 0
        if all(min(row) > last + added for row, last in zip(lowest.tolist(), self.last_positions, strict=True)):
            return
        last = self.highest[:, -1]
        if self.tail_advances:
            last = last + (past - self.caller_length if mask is None else mask[:, self.caller_length : past].sum(1))
        if mask is not None:
            lowest = lowest.masked_fill(mask[:, -columns:] == 0, torch.iinfo(lowest.dtype).max)
        below = (lowest.amin(1) <= last).nonzero().flatten().tolist()
        if below:
            row = below[0]
            raise UnsupportedCallError(
                f"position_ids of row {row} begin at {int(lowest[row].amin())}, but the pruned cache stands for tokens up to "
                f"position {int(last[row])}. Positions are those of the full sequence and go on at {int(last[row]) + 1}: count "
                "them from `cache.get_seq_length()` or the attention mask, not from the entries of a layer, or leave them out."
            )

    def check_batch(self, batch: int) -> None:
        """Raise UnsupportedCallError if the cache was made with another number of rows."""
        if self.rows != batch:
            raise UnsupportedCallError(
                f"A pruned cache of {self.rows} rows was continued with {batch} rows; allowed: the same rows."
            )

    def check_columns(self, attention_mask: Tensor | None, expected: int, new_columns: int) -> None:
        """Raise UnsupportedCallError unless the caller's mask covers `expected` tokens, of which `new_columns` are new."""
        if attention_mask is not None and attention_mask.shape[1] != expected:
            raise UnsupportedCallError(
                f"attention_mask has {attention_mask.shape[1]} columns; the pruned cache stands for {expected - new_columns} "
                f"tokens of the full sequence and {new_columns} are new, so {expected} are needed."
            )

    def later_tokens(self, past: int, attention_mask: Tensor | None, new_columns: int) -> tuple[Tensor | None, int]:
        """Return the caller's mask `[batch, tokens]` of what follows the latest prefill, or None, and the number of tokens.

        In a step of one token it is None, too, where it masks nothing.

        Args:
            past: tokens of the caller's sequence before this call.
            attention_mask: the caller's mask `[batch, past + new_columns]`, or None.
            new_columns: tokens of this call.
        """
        expected = past + new_columns
        self.check_columns(attention_mask, expected, new_columns)
        later = None if attention_mask is None else attention_mask[:, self.caller_length :]
        # More tokens keep theirs: backends look for packed prompts where there is none. A graph cannot follow the values.
        if later is not None and new_columns == 1 and not torch.compiler.is_compiling() and bool(later.all()):
            later = None
        return later, expected - self.caller_length

    def cropped(self, caller_length: int) -> PrunedCacheState:
        """Return the state once everything from the caller's column `caller_length` on is taken away; 0 is not allowed."""
        return replace(
            self,
            caller_length=caller_length,
            layer_groups=tuple(group.cropped(caller_length) for group in self.layer_groups),
            highest=self.highest[:, :caller_length],
            marks=None if self.marks is None else self.marks.cropped(caller_length),
        )

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> PrunedCacheState:
        """Return the state after `change` was made to the rows of the cache."""
        groups = tuple(group.with_rows(change) for group in self.layer_groups)
        marks = None if self.marks is None else self.marks.with_rows(change)
        return replace(self, layer_groups=groups, highest=change(self.highest), marks=marks)
