"""The images of a prefill that is cut between layers, and what is left of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import Selection, VisionSignal
from vlmprune.methods.layer_batch import TextSpans

from ..prefill.compaction import Compaction, plan_compaction


@dataclass(eq=False)
class VisualTokens:
    """The images of a prefill and what is left of them.

    Attributes:
        rows: batch row per image.
        columns: per image int64 `[alive]`, `row * columns + column` of the alive tokens in the caller's columns, in the order
            in which the layers see them.
        index: per image int64 `[alive]`, indices into the image's own visual token order.
        schedule: per image the layers at which it is cut, and to how many tokens (None: the method decides).
        text: bool `[batch, columns]`, valid tokens that are not visual.
        visual: bool `[batch, columns]`, placeholders before any pruning.
        text_lengths: true entries per row of `text`.
        visual_lengths: true entries per row of `visual`.
        totals: visual tokens per image before any pruning.
        layouts: geometry per image before any pruning.
        spans: per image the flat columns of the text around it.
        vision: per signal of the vision tower and image the channels of its own visual tokens, `[total, channels]`.
        carried: per image what the method's input stage handed on, `[entered, channels]`; empty if nothing.
        entered: per image int64 `[entered]`, its columns at the entry.
        place: per image int64 `[alive]`, which of the tokens that entered each is.
        reordered: whether merged tokens may stand out of the order of their columns.
    """

    rows: tuple[int, ...]
    columns: list[Tensor]
    index: list[Tensor]
    schedule: list[dict[int, int | None]]
    text: Tensor
    visual: Tensor
    text_lengths: list[int]
    visual_lengths: list[int]
    totals: tuple[int, ...] = ()
    layouts: Sequence[VisualLayout] = ()
    spans: Sequence[TextSpans] = ()
    vision: Mapping[VisionSignal, Sequence[Tensor]] = field(default_factory=dict)
    carried: Sequence[Tensor] = ()
    reordered: bool = False

    def __post_init__(self) -> None:
        self.entered = list(self.columns)
        self.place = [torch.arange(len(columns), device=columns.device) for columns in self.columns]

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

    def cut_after(self, layer: int) -> bool:
        """Return whether an image may lose tokens at a layer behind `layer`."""
        return any(cut > layer for cuts in self.schedule for cut in cuts)

    def keep(self, chosen: Sequence[int], selection: Selection) -> None:
        """Keep of the images `chosen` what `selection` says."""
        for image, kept in zip(chosen, selection.kept.split(list(selection.counts)), strict=True):
            self.columns[image] = self.columns[image][kept]
            self.index[image] = self.index[image][kept]
            self.place[image] = self.place[image][kept]
        self.reordered |= selection.features is not None

    def plan(self) -> Compaction:
        """Plan the sequence of text and alive visual tokens."""
        keep = self.text.flatten().clone()
        keep[torch.cat(self.columns)] = True
        counts = self.row_counts
        planned = plan_compaction(
            keep.view_as(self.text),
            self.visual,
            tuple(text + count for text, count in zip(self.text_lengths, counts, strict=True)),
            tuple(total - count for total, count in zip(self.visual_lengths, counts, strict=True)),
        )
        return self._in_order(planned) if self.reordered else planned

    def _in_order(self, planned: Compaction) -> Compaction:
        """Put each image's tokens in the order of `columns` into the places that `planned` has for it."""
        tokens = torch.cat(self.columns)
        places = torch.cat([columns.sort().values for columns in self.columns])
        batch, width = planned.index.shape
        targets = planned.destination.flatten()[places]
        destination = planned.destination.flatten().index_copy(0, tokens, targets).view_as(planned.destination)
        row, column = tokens // self.text.shape[1], tokens % self.text.shape[1]
        index = planned.index.flatten().index_copy(0, row * width + targets, column).view(batch, width)
        return replace(planned, index=index, destination=destination, places=planned.index)
