"""A Llama language model in plain steps, one row at a time, whose tokens can be taken out between layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from support.host_parts import decoder
from support.oracle import merged_embeddings
from support.tiny_models import IMAGE_TOKEN, FamilyCase


@dataclass
class LayerTrace:
    """What one layer did.

    Attributes:
        logits: `[heads, tokens, tokens]`, products of queries and keys, scaled, before the mask.
        attention: the same after mask and softmax.
        modules: input and output of attention and MLP, `[tokens, dim]` each.
    """

    logits: Tensor
    attention: Tensor
    modules: list[tuple[Tensor, Tensor]]


@dataclass
class PlainRow:
    """One prompt without padding, on its way through the layers.

    Attributes:
        model: the unpatched model.
        hidden: `[tokens, dim]`.
        columns: int64 `[tokens]`, the prompt's column of each token.
        images: per image the columns of its tokens.
        compact: whether positions close gaps.
        positions: int64 `[columns of the prompt]`, the position of each column where they do not.
        traces: what each layer did.
    """

    model: Any
    hidden: Tensor
    columns: Tensor
    images: list[Tensor]
    compact: bool
    traces: list[LayerTrace] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.positions = self.columns.clone()

    def close_gaps(self) -> None:
        """Let positions close the gaps of what was taken out so far, and keep those that come."""
        self.compact = False
        self.positions[self.columns] = torch.arange(len(self.columns))

    def alive(self, image: int) -> Tensor:
        """Return the places of an image's tokens that are left, int64, in `hidden`."""
        return torch.isin(self.columns, self.images[image]).nonzero().flatten()

    def text_after(self, image: int) -> Tensor:
        """Return the places of the words behind an image."""
        visual = torch.isin(self.columns, torch.cat(self.images))
        return (~visual & (self.columns > self.images[image].max())).nonzero().flatten()

    def local(self, image: int) -> list[int]:
        """Return which of an image's tokens are left, as indices into its own order."""
        return torch.searchsorted(self.images[image], self.columns[self.alive(image)]).tolist()

    def keep(self, image: int, places: Tensor) -> None:
        """Take out all tokens of an image but those in `places`."""
        gone = self.alive(image)
        gone = gone[~torch.isin(gone, places)]
        left = torch.ones(len(self.columns), dtype=torch.bool)
        left[gone] = False
        self.hidden, self.columns = self.hidden[left], self.columns[left]

    def projected(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what a layer's attention gets, its rotated queries and keys, and its values, `[heads, tokens, head_dim]`."""
        module = decoder(self.model).layers[layer]
        attention = module.self_attn
        normed = module.input_layernorm(self.hidden)
        query, key, value = (
            getattr(attention, f"{kind}_proj")(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for kind in "qkv"
        )
        positions = torch.arange(len(self.columns)) if self.compact else self.positions[self.columns]
        cos, sin = (table[0] for table in decoder(self.model).rotary_emb(normed[None], positions[None]))

        def rotated(states: Tensor) -> Tensor:
            first, second = states.chunk(2, dim=-1)
            return states * cos + torch.cat([-second, first], dim=-1) * sin

        repeats = query.shape[0] // key.shape[0]
        return normed, rotated(query), rotated(key).repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)

    def attention(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the logits of a layer on the current tokens, and their causal softmax, `[heads, tokens, tokens]`."""
        _, query, key, _ = self.projected(layer)
        logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        return logits, logits.masked_fill(~torch.ones_like(logits[0]).tril().bool(), -torch.inf).softmax(-1)

    def run(self, layer: int) -> None:
        """Run one layer."""
        module = decoder(self.model).layers[layer]
        normed, _, _, value = self.projected(layer)
        logits, attention = self.attention(layer)
        mixed = module.self_attn.o_proj((attention @ value).transpose(0, 1).flatten(1))
        hidden = self.hidden + mixed
        second = module.post_attention_layernorm(hidden)
        turned = module.mlp(second)
        self.traces.append(LayerTrace(logits, attention, [(normed, mixed), (second, turned)]))
        self.hidden = hidden + turned


def plain_row(model: Any, family: FamilyCase, row: list[Any], compact: bool) -> PlainRow:
    """Return a prompt at the entry of the language model."""
    inputs = family.inputs([row])
    columns = torch.arange(inputs["input_ids"].shape[1])
    visual = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten()
    images, start = [], 0
    for item in row:
        if isinstance(item, str):
            images.append(visual[start : start + family.tokens(item)])
            start += family.tokens(item)
    return PlainRow(model, merged_embeddings(model, inputs)[0], columns, images, compact)
