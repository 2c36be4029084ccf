"""`generate` with a cache that was pruned, or will be."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.generation import utils as generation_utils
from transformers.masking_utils import create_masks_for_generate

from vlmprune.errors import UnsupportedCallError

from ..hooks import HookSet
from .drafts import CandidateGenerators, verifies_drafts
from .pruned_cache import cache_state, prepare_cache, trust_positions

_IMAGES = ("mm_encoder_outputs", "pixel_values", "pixel_values_videos")
# Where the host shares the images out among the chunks, by the name of the function that does.
_CHUNKS_HAVE_IMAGES = hasattr(generation_utils, "_slice_mm_encoder_output")


class GenerationInputs:
    """Stands in for `prepare_inputs_for_generation`, which `generate` calls before every forward.

    A step of decoding with a pruned static cache gets its positions here, outside of what the host compiles; see
    `GenerationMasks`. An assisted `generate` that goes on from a pruned cache is given the new tokens only, which the host
    forgets to do.
    """

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self.prepare = prepare
        self.__signature__ = inspect.signature(prepare)

    def __call__(
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """Prepare as the host does."""
        state = cache_state(past_key_values)
        first, embeddings = kwargs.get("is_first_iteration"), kwargs.get("inputs_embeds")
        if state is not None and first and next_sequence_length is None and verifies_drafts(past_key_values):
            tokens = input_ids if embeddings is None else embeddings
            next_sequence_length = tokens.shape[1] - state.caller_past(past_key_values)
        made = self.prepare(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )
        if state is not None and not first:
            trust_positions(past_key_values)
            if past_key_values.is_prepared:
                made["position_ids"] = made["position_ids"] - state.removed
        return made


class GenerationMasks:
    """Stands in for `create_masks_for_generate`, with which `generate` makes a 4-D mask for static caches.

    The engine prunes by the 2-D mask, so a prefill gets that. A step of decoding whose layers all hold the same tokens, and
    attend as ever, gets the 4-D mask of what they hold, and is prepared; otherwise each layer's mask is made in the forward.
    """

    def __init__(self, create: Callable[..., Any]) -> None:
        self.create = create

    def __call__(self, *, attention_mask: Tensor | None, past_key_values: Any, **kwargs: Any) -> Any:
        """Create as the host does."""
        state = cache_state(past_key_values)
        prefill = kwargs.get("is_first_iteration") or not past_key_values.is_initialized
        if prefill or (state is not None and (len(state.layer_groups) > 1 or state.marks is not None)):
            return attention_mask
        if state is not None:
            later = None if attention_mask is None else attention_mask[:, state.caller_length :].bool()
            # Without a mask all places behind the prefill may be seen, as far as they are filled.
            count = past_key_values.get_max_length(0) - state.cache_length if later is None else later.shape[1]
            attention_mask = state.layer_groups[0].extended(later, count)
            prepare_cache(past_key_values)
        return self.create(attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)


class GenerationPrefill:
    """Stands in for `_prefill`, which may read the prompt in chunks; some methods score images with what follows them."""

    def __init__(self, prefill: Callable[..., Any], prompt_reader: Callable[[], str | None]) -> None:
        self.prefill = prefill
        self.prompt_reader = prompt_reader
        self.__signature__ = inspect.signature(prefill)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prefill as the host does; UnsupportedCallError if images come in chunks."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        chunk, model_kwargs = given["generation_config"].prefill_chunk_size, given["model_kwargs"]
        if chunk is None or not any(_given(model_kwargs.get(name)) for name in _IMAGES):
            return self.prefill(*args, **kwargs)
        if not _CHUNKS_HAVE_IMAGES:
            raise UnsupportedCallError(
                f"prefill_chunk_size={chunk}: this version of transformers leaves the images out of a prefill in chunks. "
                "Leave prefill_chunk_size unset."
            )
        method = self.prompt_reader()
        if method is not None:
            raise UnsupportedCallError(
                f"prefill_chunk_size={chunk}: {method!r} scores images with what follows them in the prompt, which is "
                "not read yet when their chunk is. Leave prefill_chunk_size unset."
            )
        return self.prefill(*args, **kwargs)


def patch_generation(model: nn.Module, hooks: HookSet, prompt_reader: Callable[[], str | None]) -> None:
    """Let `generate` tell what the model's calls alone do not.

    Args:
        model: the whole model, on which `generate` is called.
        hooks: where the stand-ins are registered.
        prompt_reader: returns the name of the method that scores images with what follows them in the prompt, or None.
    """
    prefill: Any = getattr(model, "_prefill", None)
    if prefill is not None:
        hooks.replace("generation _prefill", model, "_prefill", GenerationPrefill(prefill, prompt_reader))
    for attribute, stand_in, default in (
        ("_get_candidate_generator", CandidateGenerators, None),
        ("prepare_inputs_for_generation", GenerationInputs, None),
        ("create_masks_for_generate", GenerationMasks, create_masks_for_generate),
    ):
        replaced: Any = getattr(model, attribute, default)
        if replaced is not None:
            hooks.replace(f"generation {attribute}", model, attribute, stand_in(replaced))


def _given(images: Any) -> bool:
    return images is not None and len(images) > 0
