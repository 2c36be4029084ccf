"""The code of visual tokens: a fixed vector for each label, read off the shipped tiny-llava.

tiny-llava's language model understands its projector's features. A linear fit of these features on the labels of the patches
gives a vector for every label; their sum is a symbolic visual token. The tower learns to produce these tokens while the
language model learns to read them at M-RoPE positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from ..common.language import WIDTH, Prompts
from ..common.scenes import ALPHABET, COLOURS, MAX_STRING, SHAPES
from ..common.tokenizer import build_tokenizer
from ..llava.batches import BUSY, BatchPlan, make_batch
from ..llava.tower import GRID, normalise
from .model import LLAVA

KINDS = (len(SHAPES), len(COLOURS), 2 * len(ALPHABET), MAX_STRING, 1, 1)
"""Shape, colour, glyph (at the start of the string or later), place in the string, centre of a thing, plain ground."""
FAINT = 2.0
"""Factor for the codes of glyphs, places and centres, which are much shorter than the others."""
SEED = 11_000_000


def one_hot(labels: Tensor) -> Tensor:
    """Indicators (..., sum of `KINDS`) of labels (..., 6) in the order of `TOKEN_LABELS`."""
    shape, colour, glyph, order, centre, covered = labels.unbind(-1)
    glyph = torch.where((glyph > 0) & (order > 1), glyph + len(ALPHABET), glyph)
    parts = [
        F.one_hot(label, kinds + 1)[..., 1:]
        for label, kinds in zip((shape, colour, glyph, order), KINDS[:4], strict=True)
    ]
    return torch.cat([*parts, centre[..., None], 1 - covered[..., None]], dim=-1).float()


@torch.no_grad()
def fit_codes(batches: int = 10) -> Tensor:
    """Codes (sum of `KINDS`, width), by least squares on the features of 16 pictures a batch."""
    llava = AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32).eval()
    prompts = Prompts(build_tokenizer())
    size = sum(KINDS) + 2 * (GRID - 1)
    square, product = torch.zeros(size, size), torch.zeros(size, WIDTH)
    place = torch.arange(GRID * GRID)
    where = torch.cat([F.one_hot(place // GRID, GRID)[:, 1:], F.one_hot(place % GRID, GRID)[:, 1:]], dim=1).float()
    where -= where.mean(0)
    for number in range(batches):
        batch = make_batch(BatchPlan(16, BUSY), prompts, np.random.default_rng([SEED, number]))
        features = torch.stack(list(llava.get_image_features(normalise(batch.pixels), return_dict=True).pooler_output))
        labels = batch.labels.transpose(1, 2)
        covered = ((labels[..., 0] > 0) | (labels[..., 2] > 0)).long()
        known = torch.cat([one_hot(torch.cat([labels, covered[..., None]], -1)), where.expand(16, -1, -1)], -1)
        known, features = known.flatten(0, 1), features.flatten(0, 1)
        square += known.T @ known
        product += known.T @ features
    codes = torch.linalg.solve(square + 1e-2 * torch.eye(size), product)[: sum(KINDS)]
    codes[sum(KINDS[:2]) : sum(KINDS[:5])] *= FAINT
    return codes


class Codes(nn.Module):
    """Symbolic visual tokens: sums of the codes of what each token shows."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(sum(KINDS), WIDTH))

    def forward(self, labels: Tensor) -> Tensor:
        """Tokens (batch, tokens, width) for labels (batch, labels, tokens)."""
        return one_hot(labels.transpose(1, 2)) @ self.table


def blur(labels: Tensor, share: float) -> Tensor:
    """Token labels with a share of the shapes and colours forgotten, each on its own, but for the centres of things."""
    forget = torch.rand(labels[:, :2].shape) < share
    forget &= labels[:, 4:5] == 0
    return torch.cat([labels[:, :2].masked_fill(forget, 0), labels[:, 2:]], dim=1)
