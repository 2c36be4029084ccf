"""Assisted decoding: which tokens of a call are drafts that the model is to verify, and no part of the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_PROMPT = "_vlmprune_prompt"


class CandidateGenerators:
    """Stands in for `_get_candidate_generator`, with which every assisted `generate` begins; notes the prompt's length.

    The host verifies the first drafts in the same call that reads the prompt, and nothing in it says where the prompt ends.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.__signature__ = inspect.signature(make)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make what the host makes."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        model_kwargs = given["model_kwargs"]
        embeddings, cache = model_kwargs.get("inputs_embeds"), model_kwargs.get("past_key_values")
        if cache is not None:
            prompt = given["input_ids"] if embeddings is None else embeddings
            cache.__dict__[_PROMPT] = int(prompt.shape[1])
        return self.make(*args, **kwargs)


def verifies_drafts(cache: Any) -> bool:
    """Return whether the next call is the first of an assisted `generate`."""
    return _PROMPT in cache.__dict__


def take_drafts(cache: Any, tokens: int) -> int:
    """Return how many of the last tokens of a call are drafts, once per assisted `generate`.

    Args:
        cache: the call's cache.
        tokens: tokens of the caller's sequence once the call is over.
    """
    prompt = cache.__dict__.pop(_PROMPT, None)
    return 0 if prompt is None else max(0, tokens - prompt)
