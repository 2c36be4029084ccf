"""One row through the layers of an unpatched LLaVA by plain products: attention maps, keys, states, and cuts between layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from support.host_parts import decoder
from support.oracle import merged_embeddings
from support.tiny_models import IMAGE_TOKEN


@dataclass(eq=False)
class PlainRow:
    """What a row is between two layers.

    Attributes:
        entry: `[tokens, dim]`, what entered the first layer.
        hidden: `[tokens, dim]`, what enters the next layer.
        positions: int64 `[tokens]`.
        images: per image the tokens of `hidden` that are its own, in order.
        numbers: per image which of its visual tokens these are named by.
        attention: `[heads, tokens, tokens]` of the layer before, softmaxed; None before the first.
        keys: `[tokens, kv_heads, head_dim]` of the layer before, rotated.
        memory: the plain method's own.
    """

    entry: Tensor
    hidden: Tensor
    positions: Tensor
    images: list[list[int]]
    numbers: list[list[int]]
    attention: Tensor | None = None
    keys: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def text_after(self, image: int) -> list[int]:
        """Return the tokens behind an image that belong to none."""
        visual = {token for tokens in self.images for token in tokens}
        return [token for token in range(max(self.images[image]) + 1, len(self.hidden)) if token not in visual]

    def replace(self, new: list[tuple[list[int], Tensor]], compact: bool) -> None:
        """Put in the place of each image the tokens `new` has for it: which of the row's each is named by, and its state."""
        hidden, positions, images, numbers, at = [], [], [], [], 0
        for image, (named, states) in enumerate(new):
            old = self.images[image]
            before = list(range(at, min(old)))
            hidden += [self.hidden[before], states]
            positions += [self.positions[before], self.positions[named]]
            start = sum(map(len, positions)) - len(named)
            images.append(list(range(start, start + len(named))))
            numbers.append([self.numbers[image][old.index(token)] for token in named])
            at = max(old) + 1
        hidden.append(self.hidden[at:])
        positions.append(self.positions[at:])
        self.hidden, self.images, self.numbers = torch.cat(hidden), images, numbers
        self.positions = torch.arange(len(self.hidden)) if compact else torch.cat(positions)


def probe(model: Any, layer: int, row: PlainRow) -> tuple[Tensor, Tensor]:
    """Return causal attention `[heads, tokens, tokens]` and rotated keys `[tokens, kv_heads, head_dim]` of a layer."""
    language_model = decoder(model)
    module = language_model.layers[layer]
    normed = module.input_layernorm(row.hidden)[None]
    attention = module.self_attn
    query, key = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *language_model.rotary_emb(normed, row.positions[None]))
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ repeated.transpose(2, 3))[0] * attention.scaling
    unseen = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    return logits.masked_fill(unseen, -torch.inf).softmax(-1), key[0].transpose(0, 1)


@torch.no_grad()
def run_row(
    model: Any,
    inputs: dict[str, Tensor],
    index: int,
    totals: list[int],
    cut: Callable[[Any, int, PlainRow], None],
) -> tuple[PlainRow, Tensor]:
    """Run one row; `cut(model, layer, row)` may change what enters a layer. Returns the row and its logits `[tokens, words]`."""
    valid = inputs["attention_mask"][index].bool()
    embeddings = merged_embeddings(model, inputs)[index][valid]
    ids = inputs["input_ids"][index][valid]
    visual = (ids == IMAGE_TOKEN).nonzero().flatten().split(totals)
    row = PlainRow(
        entry=embeddings,
        hidden=embeddings,
        positions=torch.arange(len(ids)),
        images=[part.tolist() for part in visual],
        numbers=[list(range(total)) for total in totals],
    )
    language_model = decoder(model)
    for layer, module in enumerate(language_model.layers):
        cut(model, layer, row)
        row.attention, row.keys = probe(model, layer, row)
        hidden = row.hidden[None]
        mask = torch.ones(len(row.hidden), len(row.hidden), dtype=torch.bool).tril()[None, None]
        embedded = language_model.rotary_emb(hidden, row.positions[None])
        row.hidden = module(hidden, attention_mask=mask, position_embeddings=embedded)[0]
    return row, model.lm_head(language_model.norm(row.hidden))
