"""One call whose sequence differs from layer to layer: what is alive, and what each layer must be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection
from vlmprune.methods.layer_batch import LayerSignal
from vlmprune.record import RunRecord

from ..cache.state import LayerGroup, PrunedCacheState
from ..cache.trace import columns_held, highest_positions, positions_lowered
from ..prefill.compaction import Compaction, gather_columns, restore_columns
from ..prefill.position_gaps import dropped_positions
from .visual_tokens import VisualTokens


@dataclass(eq=False)
class LayerRun:
    """A running call of the language model, in the caller's columns.

    Attributes:
        positions: what the caller passed, int64 `[..., batch, columns]`.
        mask: the caller's mask `[batch, caller_past + columns]` as bool, None where it masks nothing.
        caller_past: tokens of the caller's sequence before this call.
        state: what earlier prefills left behind, or None.
        method: the name of the method that cuts.
        drafts: how many of the last tokens are drafts of assisted decoding, which the method may not look at.
        images: the images of a prefill that is cut, or None.
        entry: what was dropped before the first layer, or None.
        last_column: int64 `[batch]`, column of the last prompt token at the entry.
        compact_entry: whether positions close the gaps of what was dropped before the first layer.
        compact_layers: whether positions close the gaps of what was dropped inside.
        record: the record of this prefill as it was at the entry.
        deepstack: per layer the features that are added to the visual tokens of its output.
        compaction: the current sequence; None while it is the caller's.
        inputs: what replaces the host's arguments of the layers from here on.
        layer_groups: groups of layers with equal caches, up to here.
        cuts: the layers cut so far, and the sequence after each.
        kept_by_cut: after each cut the indices alive per image.
        scored: the layers whose attention was read so far.
        captured: projections and rotary positions by what they are and their layer, until they are read.
        projected_keys: a layer and its keys before rotation, which that layer need not project again.
        observed: fp32 `[batch, columns]` per signal of the layers run so far.
        padding_before: int64 `[batch]`, by how much positions count padding before a row's first token; None if they do not.
        embeddings: what entered the first layer, `[batch, entry width, dim]`.
        groups_by_cut: after each cut per image where its tokens went, int64 `[alive before]`, None where that can be told from
            what is kept.
        memory: what the method keeps from cut to cut.
        scores: per image the indices alive before its first cut that tells what it ranks by, and these numbers.
        masked: bool `[batch, width]`, tokens that are no longer seen, of a method that masks and takes nothing out.
    """

    positions: Tensor
    mask: Tensor | None
    caller_past: int
    state: PrunedCacheState | None
    method: str
    drafts: int = 0
    images: VisualTokens | None = None
    entry: Compaction | None = None
    last_column: Tensor | None = None
    compact_entry: bool = True
    compact_layers: bool = True
    record: RunRecord | None = None
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    compaction: Compaction | None = None
    inputs: dict[str, Any] | None = None
    layer_groups: list[LayerGroup] = field(default_factory=list)
    cuts: list[tuple[int, Compaction]] = field(default_factory=list)
    kept_by_cut: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    captured: dict[tuple[str, int], Any] = field(default_factory=dict)
    projected_keys: tuple[int, Tensor] | None = None
    observed: dict[LayerSignal, Tensor] = field(default_factory=dict)
    padding_before: Tensor | None = None
    embeddings: Tensor | None = None
    groups_by_cut: list[tuple[int, list[Tensor | None]]] = field(default_factory=list)
    memory: dict[Any, Any] = field(default_factory=dict)
    scores: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    masked: Tensor | None = None

    def __post_init__(self) -> None:
        self.compaction = self.entry
        inner = self.state.layer_groups[1:] if self.state is not None else ()
        self.boundaries = {group.first_layer for group in inner}
        if self.images is not None:
            for cuts in self.images.schedule:
                self.boundaries.update(cuts)
            self.entry_columns = torch.cat(self.images.columns).sort().values

    @property
    def batch(self) -> int:
        """Rows of the call."""
        return self.positions.shape[-2]

    @property
    def width(self) -> int:
        """Columns of the current sequence."""
        return self.positions.shape[-1] if self.compaction is None else self.compaction.width

    def last_tokens(self) -> Tensor:
        """Return the current column of each row's last prompt token, int64 `[batch]`."""
        if self.compaction is None:
            assert self.last_column is not None
            return self.last_column
        return torch.full((self.batch,), self.compaction.width - 1 - self.drafts, device=self.positions.device)

    def current(self, columns: Tensor) -> Tensor:
        """Translate flat caller's columns to flat columns `row * width + column` of the current sequence."""
        if self.compaction is None:
            return columns
        return (
            self.compaction.destination.flatten()[columns] + columns // self.positions.shape[-1] * self.compaction.width
        )

    def at_entry(self, columns: Tensor) -> Tensor:
        """Translate flat caller's columns to flat columns of the sequence that entered the first layer."""
        if self.entry is None:
            return columns
        return self.entry.destination.flatten()[columns] + columns // self.positions.shape[-1] * self.entry.width

    @property
    def cut_images(self) -> VisualTokens:
        """The images of a prefill; only there may tokens be dropped between layers."""
        if self.images is None:
            raise RuntimeError("This call of the language model holds no images.")
        return self.images

    def cut(
        self, layer: int, chosen: Sequence[int], selection: Selection, hidden: Tensor, keys: Tensor | None
    ) -> Tensor:
        """Drop tokens at the input of `layer` and go on with the shorter sequence.

        Args:
            layer: the layer that is cut.
            chosen: the images that `selection` speaks of.
            selection: which of their tokens stay.
            hidden: the states that enter the layer, `[batch, width, dim]`.
            keys: that layer's keys before rotation, if they are at hand, `[batch, width, dim]`.

        Returns:
            The shorter states.
        """
        images = self.cut_images
        counts = [len(images.columns[image]) for image in chosen]
        self._note_scores(chosen, selection, counts)
        before = torch.cat([images.columns[image] for image in chosen])
        images.keep(chosen, selection)
        planned = images.plan()
        source = planned.index
        if self.compaction is not None:
            now = self.compaction.destination.gather(1, source.clamp(min=0)).clamp(max=self.compaction.width - 1)
            source = now.masked_fill(source < 0, -1)
        (shorter,) = gather_columns([hidden], source)
        self.compaction = planned
        self.cuts.append((layer, planned))
        self.kept_by_cut.append((layer, list(images.index)))
        self.groups_by_cut.append((layer, self._groups(chosen, selection, counts)))
        if selection.features is not None:
            return self._merged(layer, chosen, selection, before, shorter)
        if keys is not None and not torch.is_grad_enabled():
            rows = torch.arange(self.batch, device=keys.device)[:, None]
            self.projected_keys = (layer, keys[rows, source.clamp(min=0)])
        return shorter

    def mask_out(self, layer: int, chosen: Sequence[int], selection: Selection) -> None:
        """Let the layers from `layer` on no longer see what `cut` would take out; it stays in the sequence."""
        images = self.cut_images
        self._note_scores(chosen, selection, [len(images.columns[image]) for image in chosen])
        before = torch.cat([images.columns[image] for image in chosen])
        images.keep(chosen, selection)
        left = torch.cat([images.columns[image] for image in chosen])
        masked = ~self._ones() if self.masked is None else self.masked
        masked = masked.flatten().index_fill(0, self.current(before), True).index_fill(0, self.current(left), False)
        self.masked = masked.view(self.batch, self.width)
        self.kept_by_cut.append((layer, list(images.index)))
        self.groups_by_cut.append((layer, [None] * len(images.rows)))

    def ranked(self) -> Sequence[tuple[Tensor | None, Tensor] | None]:
        """Return per image what its first cut ranked its tokens by, with their indices; nothing if no cut tells."""
        return [self.scores.get(image) for image in range(len(self.cut_images.rows))] if self.scores else ()

    def _note_scores(self, chosen: Sequence[int], selection: Selection, counts: list[int]) -> None:
        if selection.scores is not None:
            for image, part in zip(chosen, selection.scores.split(counts), strict=True):
                self.scores.setdefault(image, (self.cut_images.index[image], part))

    def _groups(self, chosen: Sequence[int], selection: Selection, counts: list[int]) -> list[Tensor | None]:
        groups: list[Tensor | None] = [None] * len(self.cut_images.rows)
        if selection.groups is not None:
            for image, part in zip(chosen, selection.groups.split(counts), strict=True):
                groups[image] = part
        return groups

    def _merged(
        self, layer: int, chosen: Sequence[int], selection: Selection, before: Tensor, shorter: Tensor
    ) -> Tensor:
        """Give the kept tokens of the images `chosen`, once `before`, their merged values; DeepStack's to come too."""
        assert selection.features is not None
        columns = torch.cat([self.cut_images.columns[image] for image in chosen])
        for later, features in self.deepstack.items():
            if selection.merge is None or later < layer:
                continue
            source, target = (torch.searchsorted(self.entry_columns, places) for places in (before, columns))
            merged = selection.merge(features[source].float()).to(features)
            self.deepstack[later] = features.index_copy(0, target, merged)
        flat = shorter.flatten(0, 1)
        return flat.index_copy(0, self.current(columns), selection.features.to(flat)).view_as(shorter)

    def token_kinds(self, past: int, valid: Tensor | None) -> Tensor:
        """Return the kind of every key, int8 `[batch, past + width]`: 0 padding, 1 system, 2 visual, 3 text."""
        text, visual = self.cut_images.text, self.cut_images.visual
        kinds = torch.where(visual, 2, torch.where(visual.cumsum(1) > 0, 3, 1)) * (text | visual)
        if self.compaction is not None:
            kinds = kinds.gather(1, self.compaction.index.clamp(min=0)) * (self.compaction.index >= 0)
        kinds = torch.cat([torch.ones(self.batch, past, dtype=kinds.dtype, device=kinds.device), kinds], dim=1)
        return (kinds if valid is None else kinds * valid).to(torch.int8)

    def group_inputs(self, layer: int, past: int) -> tuple[Tensor, Tensor | None]:
        """Return positions `[..., batch, width]` and mask `[batch, past + width]` (or None) from `layer` on."""
        before = self.state.group(layer) if self.state is not None else None
        positions, removed, lower = self._positions(before)
        valid = self.valid_columns(layer, past)
        if self.images is not None:
            index = None if self.compaction is None else self.compaction.index
            group = LayerGroup(
                first_layer=layer,
                cache_length=past + self.width,
                valid=valid,
                removed=removed,
                columns=columns_held(before, self.caller_past, self.batch, index, self.width).to(positions.device),
                lowered=positions_lowered(before, self.caller_past, lower, self.positions),
            )
            self.layer_groups.append(group)
        return positions, valid

    def valid_columns(self, layer: int, past: int) -> Tensor | None:
        """Return the bool mask `[batch, past + width]` of the current sequence in `layer`, or None if nothing is masked."""
        before = None
        if self.state is not None:
            length = self.state.caller_length
            later = None if self.mask is None else self.mask[:, length : self.caller_past]
            before = self.state.group(layer).extended(later, self.caller_past - length)
        elif self.mask is not None and past:
            before = self.mask[:, :past]
        present = self.present()
        if before is None and present is None:
            return None
        return torch.cat(
            [self._ones(past) if before is None else before, self._ones() if present is None else present], 1
        )

    def present(self) -> Tensor | None:
        """Return bool `[batch, width]`, False at padding of the current sequence and what is masked; None if there is none."""
        if self.compaction is None:
            present = None if self.mask is None else self.mask[:, -self.width :]
        else:
            present = self.compaction.index >= 0 if self.compaction.ragged else None
        if self.masked is None:
            return present
        return ~self.masked if present is None else present & ~self.masked

    def current_positions(self, layer: int) -> Tensor:
        """Return the position ids of the current sequence in `layer`, int64 `[..., batch, width]`, padding not counted."""
        positions, _, _ = self._positions(self.state.group(layer) if self.state is not None else None)
        return positions if self.padding_before is None else positions - self.padding_before[:, None]

    def in_callers_columns(self, values: Tensor) -> Tensor:
        """Spread `values [batch, width]` over the caller's columns; 0 at dropped tokens."""
        return values if self.compaction is None else restore_columns(values[..., None], self.compaction)[..., 0]

    def scored_columns(self, layer: int, past: int) -> Tensor | None:
        """Return `valid_columns` without drafts: what the method may look at, bool `[batch, past + width]` or None."""
        valid = self.valid_columns(layer, past)
        if not self.drafts:
            return valid
        valid = self._ones(past + self.width) if valid is None else valid.bool().clone()
        valid[:, -self.drafts :] = False
        return valid

    def restored(self, hidden: Tensor, layer: int) -> Tensor:
        """Spread the output `hidden` of `layer` over the caller's columns; as it is where nothing was dropped before."""
        compaction = self.entry
        for first, planned in self.cuts:
            if first <= layer:
                compaction = planned
        return hidden if compaction is None else restore_columns(hidden, compaction)

    def left_behind(self) -> PrunedCacheState:
        """Return what later calls with this cache must know."""
        present = self.cut_images.text | self.cut_images.visual
        highest = highest_positions(self.state, self.caller_past, self.positions, present)
        length = self.caller_past + self.positions.shape[-1]
        return PrunedCacheState(self.method, length, tuple(self.layer_groups), highest)

    def _ones(self, width: int | None = None) -> Tensor:
        size = self.width if width is None else width
        return torch.ones(self.batch, size, dtype=torch.bool, device=self.positions.device)

    def _positions(self, before: LayerGroup | None) -> tuple[Tensor, Tensor, Tensor | None]:
        positions = self.positions
        removed = torch.zeros(self.batch, 1, dtype=torch.int64, device=positions.device)
        if before is not None:
            positions, removed = positions - before.removed, before.removed
        if self.compaction is None:
            return positions, removed, None
        dropped, gone = self._gaps(positions, self.compaction)
        index = self.compaction.index
        if self.compaction.places is not None and self.compact_layers and positions.ndim == 2:
            index = self.compaction.places
        index = index.clamp(min=0)
        positions = (positions - dropped).take_along_dim(index.expand(*positions.shape[:-1], -1), -1)
        positions = positions * (self.compaction.index >= 0)
        return positions, removed + gone, dropped if isinstance(dropped, Tensor) else None

    def _gaps(self, positions: Tensor, compaction: Compaction) -> tuple[Tensor | int, Tensor | int]:
        """Return how far positions go down to close gaps, and how far those after this call do."""
        at_entry = self.entry is not None and self.compact_entry
        inside = self.compact_layers and compaction is not self.entry
        if not at_entry and not inside:
            return 0, 0
        if positions.ndim == 3:
            whole = self.cut_images.text | self.cut_images.visual
            entered = whole if self.entry is None else _kept(self.entry)
            return dropped_positions(
                positions, whole if at_entry else entered, _kept(compaction) if inside else entered
            )
        dropped: Tensor | int = 0
        counts = [0] * self.batch
        entry_removed = self.entry.removed if self.entry is not None else (0,) * self.batch
        if self.entry is not None and at_entry:
            dropped, counts = self.entry.dropped_before, list(entry_removed)
        if inside:
            inner = compaction.dropped_before - (self.entry.dropped_before if self.entry is not None else 0)
            dropped = dropped + inner
            counts = [
                count + total - entry
                for count, total, entry in zip(counts, compaction.removed, entry_removed, strict=True)
            ]
        return dropped, torch.tensor(counts).to(positions.device, non_blocking=True)[:, None]


def _kept(compaction: Compaction) -> Tensor:
    return compaction.destination < compaction.width
