"""The first decoder layer as methods see it before it runs, and the text whose queries they ask it for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.first_layer import FirstLayer, question_range

from ..calls import LanguageModelCall
from .image_spans import ImageSpans
from .token_places import token_places

if TYPE_CHECKING:
    from ..families.family import Family


def first_layer(family: Family) -> FirstLayer:
    """Return the projections of the first decoder layer."""
    layer: Any = family.first_layer
    attention = layer.self_attn
    return FirstLayer(
        family=family.name,
        width=int(family.config.get_text_config().hidden_size),
        heads=int(family.config.get_text_config().num_attention_heads),
        scale=float(attention.scaling),
        queries=partial(_projected, layer, "q_proj", "q_norm"),
        keys=partial(_projected, layer, "k_proj", "k_norm"),
    )


def _projected(layer: Any, name: str, norm: str, embeddings: Tensor) -> Tensor:
    attention: Any = layer.self_attn
    projection = getattr(attention, name)
    weight = next(projection.parameters())
    if type(weight).__name__ == "DTensor" or not weight.numel():
        raise UnsupportedCallError(
            f"The weights of `{name}` in the first decoder layer are spread over processes (FSDP) before it runs; "
            "allowed: a model that is whole on its device, or a method that does not score with that layer."
        )
    states = layer.input_layernorm(embeddings if weight.is_meta else embeddings.to(weight.device))
    heads: Tensor = projection(states).unflatten(-1, (-1, attention.head_dim))
    own: nn.Module | None = getattr(attention, norm, None)
    return (heads if own is None else own(heads)).to(embeddings.device)


def read_questions(
    call: LanguageModelCall,
    spans: ImageSpans,
    image_end: int | None,
    turn_end: frozenset[int],
    embed: Callable[[Tensor], Tensor],
    prompts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the embeddings of the question that goes with each encoded image, `[tokens, dim]`; see `question_range`.

    Args:
        call: the call in the caller's columns.
        spans: the images.
        image_end: the id that closes an image, if there is one.
        turn_end: ids that close a turn.
        embed: embeds ids, to tell those tokens where the call has embeddings in place of ids.
        prompts: int64 `[batch, columns]`, the prompt that each token belongs to where a row holds several.
    """
    # 1 closes an image, 2 a turn, 0 is anything else.
    marks = torch.zeros(call.batch, call.columns, dtype=torch.int64)
    marks[token_places(call, frozenset() if image_end is None else frozenset({image_end}), embed)] = 1
    marks[token_places(call, turn_end, embed)] = 2
    marks[call.visual] = 0
    alive = call.valid & (torch.arange(call.columns) < call.columns - call.drafts)
    of_prompt = torch.zeros_like(marks) if prompts is None else prompts.cpu()
    starts = torch.tensor(spans.counts).cumsum(0) - torch.tensor(spans.counts)
    begins = [divmod(place, call.columns) for place in spans.flat[starts].tolist()]
    found: dict[tuple[int, int], Tensor] = {}
    questions = []
    for row, column in (begins[image] for image in spans.first_of):
        prompt = int(of_prompt[row, column])
        if (row, prompt) not in found:
            columns = (alive[row] & (of_prompt[row] == prompt)).nonzero().flatten()
            last = int(call.visual[row, columns].nonzero()[-1])
            begin, end = question_range(marks[row, columns].tolist(), last, 1, frozenset({2}))
            asking = columns[begin:end].to(call.device, non_blocking=True)
            found[row, prompt] = call.tokens[row, asking].detach()
        questions.append(found[row, prompt])
    return tuple(questions)
