"""Calls that go on with a pruned cache: mask and positions of the caller's sequence, translated for the shorter one."""

from __future__ import annotations

from typing import Any

from ..calls import LanguageModelCall


def continued_inputs(call: LanguageModelCall) -> dict[str, Any]:
    """Return the arguments of a call whose cache was pruned by an earlier prefill.

    Raises:
        UnsupportedCallError: another number of rows than the cache has, or a mask that does not cover what it stands for.
    """
    state = call.state
    assert state is not None
    state.check_batch(call.batch)
    call.check_mask()
    mask = state.valid_columns(call.cache, call.mask, call.columns)
    return {**call.arguments, "attention_mask": mask, "position_ids": call.positions - state.removed}
