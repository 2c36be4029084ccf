"""Symbolic visual tokens: what the patches show, written in the language model's own word embeddings.

The language model learns to look things up on these, without a picture or a tower; the projector then learns to produce
them from the tower's features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..common.language import WIDTH
from ..common.scenes import COLOUR_NAMES, MAX_STRING, SHAPES
from ..common.tokenizer import glyph_tokens
from .tower import GRID


class SymbolicTokens(nn.Module):
    """Sum of the embeddings of a patch's shape word, colour word, glyph, place in the string, and row and column."""

    shape_ids: Tensor
    colour_ids: Tensor
    first_ids: Tensor
    later_ids: Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerFast, deviation: float = 0.05) -> None:
        super().__init__()
        first, later = glyph_tokens()
        for name, words in {"shape": SHAPES, "colour": COLOUR_NAMES, "first": first, "later": later}.items():
            ids = torch.tensor([0, *tokenizer.convert_tokens_to_ids(list(words))])
            self.register_buffer(f"{name}_ids", ids, persistent=False)
        self.order = nn.Embedding(MAX_STRING + 1, WIDTH)
        self.centre = nn.Embedding(2, WIDTH)
        self.ground = nn.Parameter(torch.empty(WIDTH))
        self.row = nn.Embedding(GRID, WIDTH)
        self.column = nn.Embedding(GRID, WIDTH)
        for weight in self.parameters():
            nn.init.normal_(weight, std=deviation)

    def forward(self, labels: Tensor, words: Tensor, window: Tensor) -> Tensor:
        """Tokens (batch, patches, width) for labels (batch, labels, patches) at the patches `window` of the grid.

        `words` is the embedding matrix of the language model.
        """
        shape, colour, glyph, order, centre = labels.unbind(1)
        glyph_ids = torch.where(order == 1, self.first_ids[glyph], self.later_ids[glyph])
        tokens = self.row(window // GRID) + self.column(window % GRID)
        for held, ids in ((shape, self.shape_ids[shape]), (colour, self.colour_ids[colour]), (glyph, glyph_ids)):
            tokens = tokens + words[ids] * (held > 0)[..., None]
        tokens = tokens + self.order(order) * (order > 0)[..., None] + self.centre(centre) * (centre > 0)[..., None]
        return tokens + self.ground * ((shape == 0) & (glyph == 0))[..., None]


def blur_labels(labels: Tensor, share: float) -> Tensor:
    """Labels with a share of the patches forgotten (each kind of label on its own), as an imperfect tower would see them.

    The patch at the centre of a thing keeps its labels.
    """
    forget = torch.rand(labels.shape) < share
    forget[:, 3] = forget[:, 2]
    forget &= labels[:, 4:] == 0
    return labels.masked_fill(forget, 0)
