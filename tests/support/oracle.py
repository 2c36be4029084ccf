"""The pruned forward by hand: compact the embeddings outside and run the unpatched language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.host_parts import decoder
from support.tiny_models import IMAGE_TOKEN


@torch.no_grad()
def merged_embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the language model's input embeddings of an unpatched model, `[batch, tokens, dim]`."""
    caught: list[Tensor] = []
    language_model = decoder(model)
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return caught[0]


def kept_columns(inputs: dict[str, Tensor], record: Any, row: int) -> Tensor:
    """Return the columns of a row that the record says are kept: valid text and kept visual tokens, ascending."""
    ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row].bool()
    placeholders = (ids == IMAGE_TOKEN).nonzero().flatten()
    columns, start = [(mask & (ids != IMAGE_TOKEN)).nonzero().flatten()], 0
    for image in record.images:
        if image.batch_index == row:
            columns.append(placeholders[start : start + image.total][image.kept])
            start += image.total
    return torch.cat(columns).sort().values


@torch.no_grad()
def row_logits(model: Any, embeddings: Tensor) -> Tensor:
    """Return the logits of one compacted row `[tokens, dim]` from the unpatched language model, `[tokens, vocabulary]`."""
    positions = torch.arange(len(embeddings))[None]
    output = decoder(model)(inputs_embeds=embeddings[None], position_ids=positions, use_cache=False)
    return model.lm_head(output.last_hidden_state)[0]


def suppressed(logits: Tensor) -> Tensor:
    """Return `logits [..., vocabulary]` without the image token, which the tiny models' generation config suppresses too."""
    logits = logits.clone()
    logits[..., IMAGE_TOKEN] = -torch.inf
    return logits


@torch.no_grad()
def greedy_tokens(model: Any, embeddings: Tensor, steps: int) -> list[int]:
    """Return the greedy continuation of one compacted row, without a cache."""
    table = model.get_input_embeddings()
    tokens: list[int] = []
    for _ in range(steps):
        tokens.append(int(suppressed(row_logits(model, embeddings)[-1]).argmax()))
        embeddings = torch.cat([embeddings, table(torch.tensor(tokens[-1:]))])
    return tokens
