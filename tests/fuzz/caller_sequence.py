"""What the caller of a model believes to be in a cache, and the logits that it must give: recomputed without any cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from support.layerwise import Positions
from vlmprune.patches.families.registry import find_family


@dataclass(frozen=True, eq=False)
class CallerSequence:
    """A batch of token sequences in the caller's columns, padding included.

    Attributes:
        ids: int64 `[batch, columns]`.
        mask: bool `[batch, columns]`, false at padding.
        positions: int64 `[axes, batch, columns]`, as the unpruned model would have them.
        embeddings: `[batch, columns, dim]`, input of the language model.
        deepstack: per layer `[batch, columns, dim]`, what is added to its output.
        layers: int64 `[batch, columns]`, the number of layers that see the token; 0 where it was dropped before the first.
        lowered: int64 `[model layers, axes, batch, columns]`, how far the positions go down in each layer to close gaps. It is
            decided when a token enters: what a cache holds is rotated already, whatever is cropped later.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    embeddings: Tensor
    deepstack: tuple[Tensor, ...]
    layers: Tensor
    lowered: Tensor

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.ids.shape[0]

    @property
    def columns(self) -> int:
        """Length of the caller's sequence."""
        return self.ids.shape[1]

    @property
    def next_positions(self) -> Tensor:
        """The position after the last token of every row, int64 `[batch]`."""
        if not self.columns:
            return torch.zeros(self.rows, dtype=torch.int64)
        return self.positions.amax(0).masked_fill(~self.mask, -1).amax(1) + 1

    def then(self, later: CallerSequence) -> CallerSequence:
        """Return this sequence followed by `later`."""
        if not self.columns:
            return later
        deep = zip(self.deepstack, later.deepstack, strict=True)
        return CallerSequence(
            ids=torch.cat([self.ids, later.ids], 1),
            mask=torch.cat([self.mask, later.mask], 1),
            positions=torch.cat([self.positions, later.positions], 2),
            embeddings=torch.cat([self.embeddings, later.embeddings], 1),
            deepstack=tuple(torch.cat(planes, 1) for planes in deep),
            layers=torch.cat([self.layers, later.layers], 1),
            lowered=torch.cat([self.lowered, later.lowered], 3),
        )

    def seen(self, layers: Tensor, closing: Positions, before: CallerSequence) -> CallerSequence:
        """Return this turn, which follows `before`, with `layers [batch, columns]` that see each token, and gaps closed."""
        lowered = self.positions.expand(self.lowered.shape).clone()
        for row in range(self.rows):
            mask, ids = self.mask[row], self.positions[:, row]
            for layer in range(len(lowered)):
                there = ids[:, mask if closing.entry else mask & (layers[row] > 0)].unique()
                left = ids[:, mask & (layers[row] > (layer if closing.layers else 0))].unique()
                gone = there[~torch.isin(there, left)]
                base = before.lowered[layer, :, row, before.mask[row]]
                start = int(base.max()) if base.numel() else 0
                lowered[layer, :, row] = start + torch.searchsorted(gone, ids.contiguous(), right=True)
        return replace(self, layers=layers, lowered=lowered)

    def cropped(self, columns: int) -> CallerSequence:
        """Return the first `columns` columns."""
        return CallerSequence(
            ids=self.ids[:, :columns],
            mask=self.mask[:, :columns],
            positions=self.positions[..., :columns],
            embeddings=self.embeddings[:, :columns],
            deepstack=tuple(plane[:, :columns] for plane in self.deepstack),
            layers=self.layers[:, :columns],
            lowered=self.lowered[..., :columns],
        )

    def select(self, rows: Tensor) -> CallerSequence:
        """Return the given rows, int64 `[rows]`."""
        return CallerSequence(
            ids=self.ids[rows],
            mask=self.mask[rows],
            positions=self.positions[:, rows],
            embeddings=self.embeddings[rows],
            deepstack=tuple(plane[rows] for plane in self.deepstack),
            layers=self.layers[rows],
            lowered=self.lowered[:, :, rows],
        )


def layers_seen(record: Any, image: int, depth: int) -> Tensor:
    """Return in how many layers of `depth` each visual token of an image is alive, int64 `[tokens]`."""
    shown = record.images[image]
    seen = torch.zeros(shown.total, dtype=torch.int64)
    ends = [first for first, _ in shown.stages[1:]] + [depth]
    for (_, kept), end in zip(shown.stages, ends, strict=True):
        seen[kept] = end
    return seen


@torch.no_grad()
def row_logits(model: Any, sequence: CallerSequence, row: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Run one row through the unpatched layers, each on the tokens that are alive there, without a cache.

    Args:
        model: the unpatched model.
        sequence: the batch.
        row: which row.
        first: the first column whose logits are wanted.

    Returns:
        The columns from `first` on that are alive after the last layer, and their logits `[columns, vocabulary]`.
    """
    language_model = find_family(model).language_model
    seen = sequence.layers[row]
    columns = (sequence.mask[row] & (seen > 0)).nonzero().flatten()
    hidden = sequence.embeddings[row, columns]
    for layer, module in enumerate(language_model.layers):
        alive = seen[columns] > layer
        hidden, columns = hidden[alive], columns[alive]
        positions = (sequence.positions - sequence.lowered[layer])[:, row, columns]
        hidden = module(
            hidden[None],
            attention_mask=create_causal_mask(language_model.config, hidden[None], None, None),
            position_embeddings=language_model.rotary_emb(
                hidden[None], positions[:, None] if len(positions) == 3 else positions
            ),
        )[0]
        if layer < len(sequence.deepstack):
            hidden = hidden + sequence.deepstack[layer][row, columns]
    wanted = columns >= first
    return columns[wanted], model.lm_head(language_model.norm(hidden[wanted]))
