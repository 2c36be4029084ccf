"""The language model's arguments for a compacted prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection

from ..cache.state import LayerGroup, PrunedCacheState
from ..cache.trace import columns_held, highest_positions, positions_lowered
from ..calls import LanguageModelCall
from .compaction import Compaction, gather_columns
from .deepstack import compact_deepstack, merging_of
from .entry_cut import EntryCut
from .image_spans import ImageSpans
from .packing import check_packing, packed_arguments, packed_positions
from .position_gaps import dropped_positions
from .token_arguments import compact_token_arguments, token_places


def compacted_inputs(
    call: LanguageModelCall,
    cut: EntryCut,
    spans: ImageSpans,
    prompts: Tensor | None,
    method: str,
    *,
    close_gaps: bool,
    mrope: bool,
) -> tuple[dict[str, Any], PrunedCacheState]:
    """Return the arguments for the shorter sequence, and what later calls with its cache must know.

    Args:
        call: the call in the caller's columns.
        cut: which visual tokens stay; some are dropped.
        spans: the images.
        prompts: int64 `[batch, columns]`, which prompt of a packed row each token belongs to; None where rows hold one each.
        method: the name of the method.
        close_gaps: whether positions of later tokens move down by what was dropped before them.
        mrope: whether one visual token may share its position ids with others.

    Raises:
        UnsupportedCallError: packed rows that cannot be compacted.
    """
    compaction, selection = cut.compaction, cut.selection
    assert compaction is not None
    assert selection is not None
    state, cache = call.state, call.cache
    if state is not None:
        state.check_batch(call.batch)
    highest = highest_positions(state, call.caller_past, call.positions, call.valid.to(call.device, non_blocking=True))
    if prompts is not None:
        check_packing(call, compaction)
        positions = packed_positions(call.positions, prompts, compaction, close_gaps=close_gaps, mrope=mrope)
        lower, removed = None, torch.zeros(call.batch, 1, dtype=torch.int64, device=call.device)
    else:
        positions, lower, removed = _positions(call, compaction, close_gaps=close_gaps, mrope=mrope)
    compacted, positions = gather_columns([call.tokens, positions], compaction.index, dims=[0, positions.ndim - 2])
    if prompts is None and positions.ndim == 3 and positions.shape[0] == 4:
        # The host makes masks from the first axis, where a gap would read as the border of a packed sequence.
        plain = positions[:1, :, :1] + torch.arange(compaction.width, device=positions.device)
        positions = torch.cat([plain, positions[1:]])
    if selection.features is not None:
        compacted = _with_merged(compacted, selection, cut, spans)

    valid = _valid_columns(call, compaction)
    length = call.past + compaction.width
    before = None if state is None else state.group(0)
    group = LayerGroup(
        first_layer=0,
        cache_length=length,
        valid=valid,
        removed=removed,
        columns=columns_held(before, call.caller_past, call.batch, compaction.index, compaction.width),
        lowered=positions_lowered(before, call.caller_past, lower, call.positions),
    )
    left_behind = PrunedCacheState(
        method, call.caller_past + call.columns, (group,), highest, packed=prompts is not None
    )
    mask = valid
    if prompts is None and mask is None and (cache is None or not close_gaps):
        mask = torch.ones(call.batch, length, dtype=torch.bool, device=call.device)
    if mask is not None and call.mask is not None:
        mask = mask.to(call.mask.dtype)
    arguments = packed_arguments(call.arguments, compaction)
    arguments = {**arguments, "inputs_embeds": compacted, "position_ids": positions, "attention_mask": mask}
    merged = merging_of(selection, spans)
    arguments = compact_token_arguments(arguments, token_places(call, compaction, cut.columns, merged))
    return compact_deepstack(arguments, compaction, cut.columns, merged), left_behind


def _positions(
    call: LanguageModelCall, compaction: Compaction, *, close_gaps: bool, mrope: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return positions in the caller's columns, right where a token is kept, how far they and how far later ones move down."""
    positions = call.positions
    lower: Tensor | None = None
    removed = torch.zeros(call.batch, 1, dtype=torch.int64, device=call.device)
    if call.state is not None:
        positions, removed = positions - call.state.removed, call.state.removed
    if close_gaps:
        lower, dropped = _closed_gaps(call, compaction, positions, mrope)
        positions, removed = positions - lower, removed + dropped
    return positions, lower, removed


def _closed_gaps(
    call: LanguageModelCall, compaction: Compaction, positions: Tensor, mrope: bool
) -> tuple[Tensor, Tensor]:
    if not mrope:
        removed = torch.tensor(compaction.removed).to(positions.device, non_blocking=True)[:, None]
        return compaction.dropped_before, removed
    kept = compaction.destination < compaction.width
    return dropped_positions(positions, call.valid.to(kept.device, non_blocking=True), kept)


def _with_merged(compacted: Tensor, selection: Selection, cut: EntryCut, spans: ImageSpans) -> Tensor:
    assert cut.compaction is not None
    assert selection.features is not None
    columns = cut.compaction.destination.shape[1]
    target = cut.compaction.destination.flatten()[cut.columns] + cut.columns // columns * cut.compaction.width
    merged = selection.features.to(compacted.dtype).split(list(selection.counts))
    values = torch.cat([merged[image] for image in spans.unique])
    return compacted.flatten(0, 1).index_copy(0, target, values).view_as(compacted)


def _valid_columns(call: LanguageModelCall, compaction: Compaction) -> Tensor | None:
    """Return the bool mask `[batch, entries before + width]`, or None if nothing is masked."""
    present = compaction.index >= 0
    before: Tensor | None = None
    if call.past and call.state is not None:
        head_mask = None if call.mask is None else call.mask[:, : call.caller_past]
        before = call.state.layer_groups[0].extended(*call.state.later_tokens(call.caller_past, head_mask, 0))
    elif call.past and call.mask is not None:
        before = call.mask[:, : call.past].to(present)
    if before is None:
        if not compaction.ragged:
            return None
        before = torch.ones(present.shape[0], call.past, dtype=torch.bool, device=present.device)
    return torch.cat([before, present], dim=1)
