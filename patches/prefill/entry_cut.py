"""What a prefill keeps of its visual tokens before the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection

from ..calls import LanguageModelCall
from .compaction import Compaction, plan_compaction
from .image_spans import ImageSpans


@dataclass(frozen=True, eq=False)
class EntryCut:
    """The visual tokens that enter the language model.

    Attributes:
        columns: int64 `[kept]`, flat columns `row * columns + column` of the kept visual tokens, image after image.
        index: per image the kept indices into its own visual token order, or their number if that is all of them.
        groups: per image where each of its visual tokens went, as `Selection.groups` says; empty where nothing is merged.
        compaction: how the rows shrink; None where every token stays.
        selection: what the method chose; None where every token stays.
    """

    columns: Tensor
    index: Sequence[Tensor | int]
    groups: Sequence[Tensor] = ()
    compaction: Compaction | None = None
    selection: Selection | None = None

    @property
    def removed(self) -> tuple[int, ...]:
        """Visual tokens dropped per row; empty where every token stays."""
        return () if self.compaction is None else self.compaction.removed

    def carried(self, spans: ImageSpans) -> Sequence[Tensor]:
        """Return what the selection hands on with the kept tokens, `[kept, channels]` per image; nothing if it does not."""
        if self.selection is None or self.selection.carried is None:
            return ()
        parts = self.selection.carried.split(list(self.selection.counts))
        return [parts[image] for image in spans.unique]

    def ranked(self, spans: ImageSpans) -> Sequence[tuple[Tensor | None, Tensor]]:
        """Return what the method ranked the tokens by, of all tokens of each image; nothing if it does not say."""
        if self.selection is None or self.selection.scores is None:
            return ()
        parts = self.selection.scores.split([spans.counts[image] for image in spans.first_of])
        return [(None, parts[image]) for image in spans.unique]


def whole_entry(call: LanguageModelCall, spans: ImageSpans) -> EntryCut:
    """Return the cut that drops nothing."""
    return EntryCut(spans.flat.to(call.device, non_blocking=True), list(spans.counts))


def plan_entry(call: LanguageModelCall, spans: ImageSpans, selection: Selection) -> EntryCut:
    """Plan the compaction of a call after `selection`, which speaks of the encoded images."""
    kept = selection.kept.split(list(selection.counts))
    index = [kept[image] for image in spans.unique]
    flat = spans.flat.to(call.device, non_blocking=True).split(list(spans.counts))
    columns = torch.cat([places[chosen] for places, chosen in zip(flat, index, strict=True)])

    lengths, removed = call.text.sum(1).tolist(), [0] * call.batch
    for row, count, image in zip(spans.rows, spans.counts, spans.unique, strict=True):
        lengths[row] += selection.counts[image]
        removed[row] += count - selection.counts[image]
    keep = call.text.flatten().to(call.device, non_blocking=True, copy=True)
    keep[columns] = True
    visual = call.visual.to(call.device, non_blocking=True)
    compaction = plan_compaction(keep.view(call.batch, call.columns), visual, tuple(lengths), tuple(removed))
    groups: Sequence[Tensor] = ()
    if selection.groups is not None:
        first = [spans.counts[image] for image in spans.first_of]
        encoded = selection.groups.split(first)
        groups = [encoded[image] for image in spans.unique]
    return EntryCut(columns, index, groups, compaction, selection)
