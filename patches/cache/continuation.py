"""Calls that go on with a pruned cache: mask and positions of the caller's sequence, translated for the shorter one."""

from __future__ import annotations

from typing import Any

from ..calls import LanguageModelCall, ModelCall
from .drafts import take_drafts, verifies_drafts
from .pruned_cache import cache_state, open_cache, take_trust


def begin_language_call(model_call: ModelCall, arguments: dict[str, Any]) -> LanguageModelCall:
    """Return the call of the language model inside `model_call`; a pruned cache is open until the forward ends.

    Raises:
        UnsupportedCallError: the cache does not hold what its state says, or positions count from its shorter length.
    """
    cache = arguments.get("past_key_values")
    state = None if cache is None else cache_state(cache)
    call = model_call.language_call = LanguageModelCall(model_call, arguments, state)
    if state is not None:
        open_cache(cache)
        call.caller_past = state.check_entries(cache)
        if not take_trust(cache):
            call.check_positions()
    if cache is not None and verifies_drafts(cache):
        call.drafts = take_drafts(cache, call.caller_past + call.columns)
    return call


def continued_inputs(call: LanguageModelCall) -> dict[str, Any]:
    """Return the arguments of a call whose cache was pruned by an earlier prefill.

    Raises:
        UnsupportedCallError: another number of rows than the cache has, a mask that does not cover what it stands for, or
            no room in a static cache.
    """
    state = call.state
    assert state is not None
    state.check_batch(call.batch)
    call.check_mask()
    state.check_room(call.cache, call.columns)
    mask = state.layer_groups[0].extended(*call.later_tokens)
    return {**call.arguments, "attention_mask": mask, "position_ids": call.positions - state.removed}
