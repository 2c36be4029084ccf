"""Many questions about one picture, where the long picture is run first and the questions continue from its cache."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from ..common.language import Answers, grade, slot_layout


@lru_cache(maxsize=8)
def _question_layout(start: int, slots: int) -> tuple[Tensor, Tensor]:
    mask, position = slot_layout(start, slots)
    return mask[:, :, start:].contiguous(), position[:, start:]


def answer_in_two(
    model: LlamaForCausalLM, prefix_ids: list[int], visual: Tensor, ids: Tensor, labels: Tensor
) -> Answers:
    """What `common.language.answer` gives (but for `early`), for less work where pictures are long."""
    batch, slots, _ = ids.shape
    embed = model.get_input_embeddings()
    prefix = embed(torch.tensor(prefix_ids)).expand(batch, -1, -1)
    picture = torch.cat([prefix, visual], dim=1)
    start = picture.shape[1]
    cache = DynamicCache()
    first = model.model(inputs_embeds=picture, past_key_values=cache, use_cache=True, output_hidden_states=True)
    mask, position = _question_layout(start, slots)
    second = model.model(
        inputs_embeds=embed(ids.flatten(1)),
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    )
    hidden = tuple(torch.cat(pair, dim=1) for pair in zip(first.hidden_states, second.hidden_states, strict=True))
    graded = grade(model.lm_head, second.last_hidden_state, labels, early=False)
    return Answers(*graded, hidden, torch.cat([torch.arange(start)[None], position], dim=1), start)
