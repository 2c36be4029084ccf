"""The images of a prefill that is cut between layers, and what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection

from ..prefill.compaction import Compaction, plan_compaction


@dataclass(eq=False)
class VisualTokens:
    """The images of a prefill and what is left of them.

    Attributes:
        rows: batch row per image.
        columns: per image int64 `[alive]`, `row * columns + column` of the alive tokens in the caller's columns.
        index: per image int64 `[alive]`, indices into the image's own visual token order.
        schedule: per image the layers at which it is cut, and to how many tokens (None: the method decides).
        text: bool `[batch, columns]`, valid tokens that are not visual.
        visual: bool `[batch, columns]`, placeholders before any pruning.
        text_lengths: true entries per row of `text`.
        visual_lengths: true entries per row of `visual`.
    """

    rows: tuple[int, ...]
    columns: list[Tensor]
    index: list[Tensor]
    schedule: list[dict[int, int | None]]
    text: Tensor
    visual: Tensor
    text_lengths: list[int]
    visual_lengths: list[int]

    @property
    def counts(self) -> list[int]:
        """Alive tokens per image."""
        return [len(columns) for columns in self.columns]

    @property
    def row_counts(self) -> list[int]:
        """Alive tokens per batch row."""
        counts = [0] * len(self.text_lengths)
        for row, count in zip(self.rows, self.counts, strict=True):
            counts[row] += count
        return counts

    def images_at(self, layer: int) -> list[int]:
        """Return the images that lose tokens at `layer`."""
        return [
            image
            for image, (cuts, count) in enumerate(zip(self.schedule, self.counts, strict=True))
            if layer in cuts and count and (cuts[layer] is None or cuts[layer] < count)  # type: ignore[operator]
        ]

    def keep(self, chosen: Sequence[int], selection: Selection) -> None:
        """Keep of the images `chosen` what `selection` says."""
        for image, kept in zip(chosen, selection.kept.split(list(selection.counts)), strict=True):
            self.columns[image] = self.columns[image][kept]
            self.index[image] = self.index[image][kept]

    def plan(self) -> Compaction:
        """Plan the sequence of text and alive visual tokens."""
        keep = self.text.flatten().clone()
        keep[torch.cat(self.columns)] = True
        counts = self.row_counts
        return plan_compaction(
            keep.view_as(self.text),
            self.visual,
            tuple(text + count for text, count in zip(self.text_lengths, counts, strict=True)),
            tuple(total - count for total, count in zip(self.visual_lengths, counts, strict=True)),
        )
