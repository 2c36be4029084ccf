"""Grounding: teach one attention layer of the language model that a shape's word looks at the patches it names.

Without it the model guesses for a long time before it discovers looking up. It is used on symbolic tokens only; on pictures
nothing tells the language model where to look.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .language import Answers
from .questions import plural
from .scenes import COLOUR_NAMES, SHAPES

LAYER = 1
HEADS = 2


class Grounding(nn.Module):
    """Which patches each word of a question names, and the loss of a layer's attention that misses them."""

    shape: Tensor
    colour: Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerFast, nothing: bool = False) -> None:
        super().__init__()
        self.nothing = nothing
        shape, colour = torch.zeros(2, len(tokenizer), dtype=torch.long)
        for i, name in enumerate(SHAPES):
            shape[tokenizer.convert_tokens_to_ids([name, plural(name)])] = i + 1
        for i, name in enumerate(COLOUR_NAMES):
            colour[tokenizer.convert_tokens_to_ids(name)] = i + 1
        self.register_buffer("shape", shape, persistent=False)
        self.register_buffer("colour", colour, persistent=False)

    def named(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mask (batch, tokens, patches): the patches of the shape, and of the colour in front of it, if there is one."""
        shape, colour = self.shape[ids], self.colour[ids].roll(1, -1)
        fits = (labels[:, None, 0] == shape[..., None]) & (shape > 0)[..., None]
        return fits & ((colour == 0)[..., None] | (labels[:, None, 1] == colour[..., None]))

    def forward(self, decoder: Any, answers: Answers, ids: Tensor, labels: Tensor, after: int = 0) -> Tensor:
        """Mean of -log(attention paid to the named patches) over the shapes' words, for `HEADS` heads of `LAYER`.

        A word that names nothing in the picture is left out or, with `nothing`, is to look at the tokens in front of
        the picture. `decoder` is the language model without its head, `after` the tokens between the picture and the slots.
        """
        layer, hidden = decoder.layers[LAYER], answers.hidden[LAYER]
        normed, attention, start = layer.input_layernorm(hidden), layer.self_attn, answers.start
        size = attention.head_dim
        query, key = (
            project(normed).unflatten(-1, (-1, size)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *decoder.rotary_emb(hidden, answers.position))
        first = start - labels.shape[-1] - after
        scores = (query[:, :HEADS, start:] @ key[:, :HEADS, :start].transpose(-1, -2)) * attention.scaling
        share = scores.log_softmax(-1)
        named = self.named(ids.flatten(1), labels)
        rows = self.shape[ids.flatten(1)] > 0 if self.nothing else named.any(-1)
        nothing = (~named.any(-1) & rows)[..., None]
        behind = torch.zeros_like(nothing).expand(-1, -1, after)
        target = torch.cat([nothing.expand(-1, -1, first), named, behind], dim=-1)
        caught = share.masked_fill(~target[:, None], -torch.inf).logsumexp(-1)
        return -caught.transpose(1, 2)[rows].mean()
