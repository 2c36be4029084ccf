"""Further arguments of the language model that have a value a token, for a sequence that has become shorter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError

from ..calls import LanguageModelCall
from .compaction import Compaction
from .sequence_bounds import SEQUENCE_BOUNDS

# What the sites before and after this one put in place themselves, and what speaks of the output, which has the caller's length.
_OWN = frozenset(
    {
        "inputs_embeds",
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "visual_pos_masks",
        "deepstack_visual_embeds",
        "logits_to_keep",
        *SEQUENCE_BOUNDS,
    }
)


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Where the values of a shorter sequence come from.

    Attributes:
        compaction: how the rows shrink.
        visual: visual tokens of all rows before.
        rows: int64 `[kept]`, of all visual tokens, row by row, those that stay, in the same order.
        merged: for methods that merge tokens: turns values of all visual tokens, row by row, into those that stay.
    """

    compaction: Compaction
    visual: int
    rows: Tensor
    merged: Callable[[Tensor], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the call."""
        batch, columns = self.compaction.destination.shape
        return batch, columns


def compact_token_arguments(arguments: dict[str, Any], places: TokenPlaces) -> dict[str, Any]:
    """Return the arguments with those that have a value a token gathered by their shape; numbers, flags and names stay.

    Known shapes are `[batch, columns, ...]`, `[1, columns, ...]`, `[axes, batch, columns, ...]`, and `[visual tokens, ...]` of
    all rows together; inside lists and mappings too.

    Raises:
        UnsupportedCallError: a tensor of another shape, or of one that can be read in two ways; names the argument.
    """
    changed = {
        name: _compacted(name, value, places)
        for name, value in arguments.items()
        if name not in _OWN and value is not None
    }
    return {**arguments, **changed}


def token_places(
    call: LanguageModelCall,
    compaction: Compaction,
    kept_columns: Tensor,
    merged: Callable[[Tensor], Tensor] | None,
) -> TokenPlaces:
    """Return where the values of the shorter sequence come from.

    Args:
        call: the call in the caller's columns.
        compaction: how its rows shrink.
        kept_columns: int64 `[kept]`, `row * columns + column` of every kept visual token, in any order.
        merged: turns values of all visual tokens, row by row, into those of the tokens of `kept_columns`; None where
            nothing is merged.
    """
    order = kept_columns.argsort()
    rank = call.visual.flatten().to(kept_columns.device).cumsum(0) - 1
    in_order = None if merged is None else lambda values: merged(values)[order.to(values.device)]
    return TokenPlaces(compaction, int(call.visual.sum()), rank[kept_columns[order]], in_order)


def token_arguments(arguments: dict[str, Any]) -> list[str]:
    """Return the names of the arguments that hold tensors and that no site puts in place by itself."""
    return [name for name, value in arguments.items() if name not in _OWN and _holds_tensors(value)]


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_tensors, value))


def _compacted(name: str, value: Any, places: TokenPlaces) -> Any:
    if isinstance(value, dict):
        return {key: _compacted(f"{name}[{key!r}]", item, places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_compacted(f"{name}[{number}]", item, places) for number, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    return _gathered(name, value, places)


def _gathered(name: str, value: Tensor, places: TokenPlaces) -> Tensor:
    batch, columns = places.shape
    shape = tuple(value.shape)
    readings = []
    if shape[:2] in ((batch, columns), (1, columns)):
        readings.append(0)
    elif shape[1:3] == (batch, columns) and len(shape) >= 3:
        readings.append(1)
    if shape[0] == places.visual and len(shape) >= 2:
        readings.append(-1)
    if len(readings) != 1:
        how = "is none of these" if not readings else "can be read in two ways"
        raise UnsupportedCallError(
            f"The language model is given {name} of shape {list(shape)} in a call that drops tokens, and it {how}: [{batch}, "
            f"{columns}, ...] or [1, {columns}, ...] (the tokens of each row), [axes, {batch}, {columns}, ...], "
            f"[{places.visual}, ...] (the visual tokens of all rows)."
        )
    (reading,) = readings
    if reading < 0:
        if places.merged is not None and value.is_floating_point():
            return places.merged(value)
        return value[places.rows.to(value.device)]
    index = places.compaction.index.to(value.device)
    plane = value.movedim((reading, reading + 1), (0, 1))
    plane = plane.expand(batch, *plane.shape[1:])
    taken = plane[torch.arange(batch, device=value.device)[:, None], index.clamp(min=0)]
    taken = taken.masked_fill((index < 0).view(*index.shape, *(1,) * (taken.ndim - 2)), 0)
    return taken.movedim((0, 1), (reading, reading + 1))
