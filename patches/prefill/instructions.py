"""What a prompt says besides its images: the words that methods score patches against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.batch import Instruction

from ..calls import LanguageModelCall
from .image_spans import ImageSpans
from .token_places import token_places


def read_instructions(
    call: LanguageModelCall,
    spans: ImageSpans,
    special: frozenset[int],
    embed: Callable[[Tensor], Tensor],
    prompts: Tensor | None = None,
) -> tuple[Instruction, ...]:
    """Return the instruction that goes with each encoded image.

    It is the text of the image's row from the row's first image on, without images and special tokens, so that a
    system prompt before it is left out; where nothing follows an image, the text before it.

    Args:
        call: the call in the caller's columns.
        spans: the images.
        special: ids that are no words.
        embed: embeds ids, to tell those tokens where the call has embeddings in place of ids.
        prompts: int64 `[batch, columns]`, the prompt that each token belongs to where a row holds several.

    Raises:
        UnsupportedCallError: a row with an image has no text.
    """
    ids = call.model_call.inputs.get("input_ids")
    words = call.text & (torch.arange(call.columns) < call.columns - call.drafts)
    if ids is not None:
        ids = ids[:, -call.columns :]
    words = words & ~token_places(call, special, embed)
    words = words.flatten().index_fill(0, spans.flat, False).view_as(words)
    of_prompt = torch.zeros_like(words, dtype=torch.int64) if prompts is None else prompts.cpu()
    places = torch.arange(call.columns)
    starts = torch.tensor(spans.counts).cumsum(0) - torch.tensor(spans.counts)
    begins = [divmod(place, call.columns) for place in spans.flat[starts].tolist()]
    found = []
    for image in spans.first_of:
        row, column = begins[image]
        prompt = of_prompt[row, column]
        first = min(place for other, place in begins if other == row and of_prompt[row, place] == prompt)
        mine = words[row] & (of_prompt[row] == prompt)
        columns = (mine & (places > first)).nonzero().flatten()
        if not len(columns):
            columns = mine.nonzero().flatten()
        if not len(columns):
            raise UnsupportedCallError(
                f"Row {row} shows an image and has no text beside special tokens; allowed: a question in the prompt, or a "
                "method that does not score by words."
            )
        columns = columns.to(call.device, non_blocking=True)
        text = call.text[row] & (places < call.columns - call.drafts) & (of_prompt[row] == prompt)
        end = min((place for other, place in begins if other == row and place > column), default=call.columns)
        behind = text & (places > column)
        following = next(some for some in (behind & (places < end), behind, text) if bool(some.any()))
        following_columns = following.nonzero().flatten().to(call.device, non_blocking=True)
        found.append(
            Instruction(
                ids=None if ids is None else ids[row, columns.to(ids.device)],
                embeddings=call.tokens[row, columns].detach(),
                following=call.tokens[row, following_columns].detach(),
            )
        )
    return tuple(found)


def special_token_ids(*configs: Any) -> frozenset[int]:
    """Return the ids that configurations name: begin, end and padding, placeholders, marks around images."""
    return _named_ids(configs, ("token_id", "token_index"))


def end_token_ids(*configs: Any) -> frozenset[int]:
    """Return the ids that configurations name as ends of a turn."""
    return _named_ids(configs, ("eos_token_id",))


def _named_ids(configs: tuple[Any, ...], endings: tuple[str, ...]) -> frozenset[int]:
    found: set[int] = set()
    for config in configs:
        for name, value in (config.to_dict() if config is not None else {}).items():
            if name.endswith(endings) and value is not None:
                found.update(value if isinstance(value, (list, tuple)) else [value])
    return frozenset(int(token) for token in found if isinstance(token, int))
