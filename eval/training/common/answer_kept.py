"""Many questions about one picture of which some tokens were dropped, as a pruned model would see it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from .dropping import gather_tokens, kept_index, kept_mask
from .language import SLOT, Answers, grade


def answer_kept(
    model: LlamaForCausalLM,
    prefix_ids: list[int],
    visual: Tensor,
    kept: Tensor,
    compact: bool,
    ids: Tensor,
    labels: Tensor,
) -> tuple[Answers, Tensor, Tensor]:
    """What `language.answer` gives with the hidden states, without the tokens that are not `kept` (batch, tokens).

    Kept tokens and questions have the position ids of the whole prompt or, with `compact`, are numbered anew. The indices of the
    kept tokens (batch, most kept) and which of them are no padding come too.
    """
    batch, slots, _ = ids.shape
    embed = model.get_input_embeddings()
    index, valid = kept_index(kept)
    prefix = embed(torch.tensor(prefix_ids)).expand(batch, -1, -1)
    before = prefix.shape[1]
    seen = gather_tokens(visual, index)
    embeds = torch.cat([prefix, seen.to(prefix.dtype), embed(ids.flatten(1))], dim=1)
    if compact:
        places, after = torch.arange(index.shape[1]).expand_as(index), kept.sum(1, keepdim=True)
    else:
        places, after = index, torch.full((batch, 1), visual.shape[1])
    position = torch.cat(
        [torch.arange(before).expand(batch, -1), before + places, before + after + torch.arange(SLOT).repeat(slots)],
        dim=1,
    )
    output = model.model(
        inputs_embeds=embeds,
        attention_mask=kept_mask(valid, before, 0, slots),
        position_ids=position,
        use_cache=False,
        output_hidden_states=True,
    )
    start = before + index.shape[1]
    graded = grade(model.lm_head, output.last_hidden_state[:, start:], labels, early=False)
    return Answers(*graded, output.hidden_states, position, start), index, valid
