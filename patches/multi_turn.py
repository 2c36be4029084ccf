"""`generate` with a pruned cache: the host counts cached tokens by the cache, the prompt by the caller."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .hooks import HookSet
from .pruned_cache import cache_state


def patch_generation_inputs(model: nn.Module, hooks: HookSet) -> None:
    """Correct the slice of new tokens when `generate` starts from a pruned cache.

    `generate` takes `len(input_ids) - cache.get_seq_length()` tokens as new; a pruned cache holds fewer entries than the tokens
    it stands for.
    """
    prepare: Any = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None:
        return

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(
        input_ids: Any, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        if kwargs.get("is_first_iteration") and next_sequence_length is not None and past_key_values is not None:
            state = cache_state(past_key_values)
            if state is not None:
                next_sequence_length -= state.caller_length - state.cache_length
        return prepare(input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs)

    hooks.replace("generation inputs", model, "prepare_inputs_for_generation", prepare_inputs_for_generation)
