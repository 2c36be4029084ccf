"""Prompts that stand one after the other in a row without padding, told apart by their position ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError

from ..calls import LanguageModelCall
from .compaction import Compaction
from .position_gaps import dropped_positions

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
_LENGTHS = ("max_length_q", "max_length_k")


def packed_prompts(call: LanguageModelCall, *, text_axis: bool) -> Tensor | None:
    """Return the number of the prompt that each token belongs to, int64 `[batch, columns]`, or None if rows hold one each.

    As the host does it: without a mask, a position that does not follow on the one before begins another prompt, and so does
    each of the boundaries that are given to flash attention. Reading the positions waits for the device, in such calls only.

    Args:
        call: the call in the caller's columns.
        text_axis: whether the host reads 2-D position ids as 1-D positions of the tokens; of three axes it makes none.
    """
    if call.mask is not None:
        return None
    boundaries = call.arguments.get(_BOUNDARIES[0])
    if boundaries is not None:
        starts = torch.zeros(call.columns + 1, dtype=torch.int64)
        starts[torch.as_tensor(boundaries).cpu()[1:-1].long()] = 1
        prompts = starts[:-1].cumsum(0).expand(call.batch, -1)
        return prompts.to(call.device) if bool(prompts[:, -1].any()) else None
    if call.model_call.inputs.get("position_ids") is None:
        return None
    positions = call.positions
    if positions.ndim == 3:
        if positions.shape[0] != 4:
            return None
        positions = positions[0]
    elif not text_axis:
        return None
    prompts = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    return prompts if bool(prompts[:, -1].any()) else None


def check_packing(call: LanguageModelCall, compaction: Compaction) -> None:
    """Raise UnsupportedCallError where a packed call cannot be compacted."""
    if call.past:
        raise UnsupportedCallError(
            f"Several prompts are packed in one row behind {call.past} tokens in the cache; allowed: packed prompts without a "
            "cache, or one prompt a row."
        )
    if compaction.ragged:
        raise UnsupportedCallError(
            f"Packed rows keep {list(compaction.lengths)} tokens, and packed rows cannot be padded; allowed: one row that "
            "holds all prompts."
        )


def packed_positions(
    positions: Tensor, prompts: Tensor, compaction: Compaction, *, close_gaps: bool, mrope: bool
) -> Tensor:
    """Return positions in the caller's columns, right where a token is kept; those of each prompt move down for itself.

    Args:
        positions: int64 `[batch, columns]`, or `[axes, batch, columns]` of which the first of four is the 1-D position, by
            which the host tells the prompts apart, so that it never has gaps.
        prompts: int64 `[batch, columns]`, from `packed_prompts`.
        compaction: how the rows shrink.
        close_gaps: whether positions move down by what was dropped before them in their prompt.
        mrope: whether the model has 3-D positions.

    Returns:
        int64 `[batch, columns]` or `[axes, batch, columns]`.

    Raises:
        UnsupportedCallError: gaps are to be left in positions by which the host tells prompts apart.
    """
    kept = compaction.destination < compaction.width
    if not mrope and not close_gaps:
        raise UnsupportedCallError(
            'positions="original" leaves gaps in the position ids, by which packed prompts are told apart; allowed: '
            'positions="compact", or one prompt a row.'
        )
    within = _dropped_within(prompts, ~kept)
    if not mrope:
        return positions - within
    if positions.ndim == 2:
        positions = positions.expand(4, -1, -1)
    axes = _closed_axes(positions[-3:], prompts, kept) if close_gaps else positions[-3:]
    return torch.cat([(positions[0] - within)[None], axes]) if len(positions) == 4 else axes


def packed_arguments(arguments: dict[str, Any], compaction: Compaction) -> dict[str, Any]:
    """Return the language model's arguments with the boundaries of flash attention moved to the kept tokens."""
    boundaries = arguments.get(_BOUNDARIES[0])
    if boundaries is None:
        return arguments
    kept = (compaction.destination < compaction.width).flatten()
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    moved = before[torch.as_tensor(boundaries, device=kept.device).long()]
    longest = int(moved.diff().max())
    given: dict[str, Any] = {name: moved.to(boundaries) for name in _BOUNDARIES if arguments.get(name) is not None}
    for name in _LENGTHS:
        if arguments.get(name) is not None:
            given[name] = torch.as_tensor(longest) if isinstance(arguments[name], Tensor) else longest
    return {**arguments, **given}


def _dropped_within(prompts: Tensor, dropped: Tensor) -> Tensor:
    """Return how many tokens of the same prompt were dropped before each token, itself included, int64 like `prompts`."""
    count = dropped.cumsum(1)
    starts = torch.ones_like(dropped)
    starts[:, 1:] = prompts.diff(dim=1) != 0
    # What was dropped before a prompt begins, carried over all of it.
    before = torch.where(starts, count - dropped.long(), 0).cummax(1).values
    return count - before


def _closed_axes(axes: Tensor, prompts: Tensor, kept: Tensor) -> Tensor:
    """Return 3-D positions without the ids that no kept token of the same prompt uses."""
    closed = axes
    for prompt in range(int(prompts.max()) + 1):
        mine = prompts == prompt
        lower, _ = dropped_positions(axes, mine, mine & kept)
        closed = torch.where(mine, axes - lower, closed)
    return closed
