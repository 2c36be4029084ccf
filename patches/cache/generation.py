"""`generate` with a pruned cache: the host counts cached tokens by the cache, the prompt by the caller."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..hooks import HookSet
from .state import cache_state


class GenerationInputs:
    """Stands in for `prepare_inputs_for_generation`; corrects the number of new tokens.

    `generate` takes `len(input_ids) - cache.get_seq_length()` tokens as new; a pruned cache holds fewer entries than the tokens
    it stands for.
    """

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self.prepare = prepare
        self.__signature__ = inspect.signature(prepare)

    def __call__(
        self, input_ids: Any, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """Prepare as the host does."""
        if kwargs.get("is_first_iteration") and next_sequence_length is not None and past_key_values is not None:
            state = cache_state(past_key_values)
            if state is not None:
                next_sequence_length -= state.caller_length - state.cache_length
        return self.prepare(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )


class GenerationPositions:
    """Stands in for `_prepare_position_ids_for_generation`, which asks the cache where the new tokens begin.

    Hosts with M-RoPE look for images among the new tokens; from a pruned cache's length they would find those in the cache again.
    """

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self.prepare = prepare
        self.__signature__ = inspect.signature(prepare)

    def __call__(self, inputs_tensor: Any, model_kwargs: dict[str, Any]) -> Any:
        """Make positions as the host does, with a cache as long as the caller's sequence."""
        cache = model_kwargs.get("past_key_values")
        state = cache_state(cache) if cache is not None else None
        if state is not None:
            model_kwargs = {**model_kwargs, "past_key_values": _CacheLength(state.caller_past(cache))}
        return self.prepare(inputs_tensor, model_kwargs)


class _CacheLength:
    """All that the host reads of a cache when it makes positions."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def patch_generation_inputs(model: nn.Module, hooks: HookSet) -> None:
    """Let `generate` start from a pruned cache."""
    for attribute, corrected in (
        ("prepare_inputs_for_generation", GenerationInputs),
        ("_prepare_position_ids_for_generation", GenerationPositions),
    ):
        prepare: Any = getattr(model, attribute, None)
        if prepare is not None:
            hooks.replace(f"generation {attribute}", model, attribute, corrected(prepare))
