"""Staged dropping by hand: the unpatched layers one after the other, each on the tokens that are alive there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config
from transformers.masking_utils import create_causal_mask

from support.oracle import merged_embeddings
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, SIGLIP, FamilyCase, llava_case

DEEP_LLAMA = LlamaConfig(**{**LLAMA_GQA.to_dict(), "num_hidden_layers": 8})
DEEP_QWEN = Qwen2Config(
    **{
        **{
            key: value
            for key, value in LLAMA_GQA.to_dict().items()
            if key not in ("model_type", "head_dim", "architectures")
        },
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
    }
)
DEEP_LLAVA: FamilyCase = llava_case("deep-llava-gqa", DEEP_LLAMA)
DEEP_LLAVA_QWEN: FamilyCase = llava_case("deep-llava-qwen", DEEP_QWEN, SIGLIP)


def alive_columns(inputs: dict[str, Tensor], record: Any, row: int, layer: int) -> Tensor:
    """Return the columns of a row that reach `layer`, in the order in which it sees them."""
    ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row].bool()
    placeholders = (ids == IMAGE_TOKEN).nonzero().flatten()
    columns, start = [(mask & (ids != IMAGE_TOKEN)).nonzero().flatten()], 0
    places = list(columns)
    for image in record.images:
        if image.batch_index == row:
            kept = [stage for first, stage in image.stages if first <= layer][-1]
            columns.append(placeholders[start : start + image.total][kept])
            places.append(columns[-1].sort().values)
            start += image.total
    return torch.cat(columns)[torch.cat(places).argsort()]


def rows_of(columns: Tensor, alive: Tensor) -> Tensor:
    """Return where each of `alive` stands in `columns`."""
    order = columns.argsort()
    return order[torch.searchsorted(columns[order], alive)]


@torch.no_grad()
def row_by_hand(
    model: Any,
    inputs: dict[str, Tensor],
    record: Any,
    row: int,
    compact: bool = True,
    later: Tensor | None = None,
    entry_compact: bool = True,
) -> Tensor:
    """Return the logits of one row at its last alive tokens and `later` ones, `[tokens, vocabulary]`, without a cache.

    Args:
        model: the unpatched model.
        record: what was kept.
        compact: whether positions close the gaps in every stage.
        later: ids of tokens that follow the prompt, seen by all layers.
        entry_compact: whether positions close the gaps of what was dropped before the first layer.
    """
    language_model = model.model.language_model
    hidden = merged_embeddings(model, inputs)[row]
    columns = alive_columns(inputs, record, row, 0)
    valid = inputs["attention_mask"][row].bool().nonzero().flatten()
    entry = columns if entry_compact else valid
    later = torch.zeros(0, dtype=torch.int64) if later is None else later
    total, extra = hidden.shape[0], len(later)
    hidden = torch.cat([hidden[columns], model.get_input_embeddings()(later)])
    columns = torch.cat([columns, total + torch.arange(extra)])
    entry = torch.cat([entry, total + torch.arange(extra)])
    for layer, module in enumerate(language_model.layers):
        alive = torch.cat([alive_columns(inputs, record, row, layer), total + torch.arange(extra)])
        hidden = hidden[rows_of(columns, alive)]
        columns = alive
        positions = torch.arange(len(columns)) if compact else torch.searchsorted(entry, columns)
        hidden = module(
            hidden[None],
            attention_mask=create_causal_mask(language_model.config, hidden[None], None, None),
            position_embeddings=language_model.rotary_emb(hidden[None], positions[None]),
        )[0]
    return model.lm_head(language_model.norm(hidden))


def cache_lengths(cache: Any) -> list[int]:
    """Return the entries of every layer's cache."""
    return [layer.keys.shape[-2] for layer in cache.layers]
