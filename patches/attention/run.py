"""One call whose attention changes: which tokens are visual, which are sinks, which rows are changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmprune.kernels.redistributed_attention import VALID, VISUAL

from ..cache.trace import columns_held
from ..layers.run import LayerRun


class LayerView(NamedTuple):
    """What one layer's keys and queries are.

    Attributes:
        columns: int64 `[batch, keys]`, the caller's column of each key, -1 where it stands for none.
        flags: uint8 `[batch, keys]`, bits of `redistributed_attention`, sinks apart.
        rows: int64 `[rows]`, columns of the current sequence in which a row of the batch may change.
        last: int64 `[batch, rows]`, the last key that each of them sees; -1 where it does not change.
    """

    columns: Tensor
    flags: Tensor
    rows: Tensor
    last: Tensor


@dataclass(eq=False)
class AttentionRun:
    """A running call of the language model, in the caller's columns.

    Attributes:
        sequence: how its sequence changes from layer to layer.
        visual: bool `[batch, known]`, visual tokens of the caller's sequence up to the latest prefill with images.
        sinks: by layer bool `[batch, known]`.
        asks: bool `[batch, columns]`, tokens of this call that follow a visual token and are none.
        finds: whether sinks are looked for among this call's tokens.
        dimensions: bool `[batch, dim]`, the channels that tell sinks, once they are known.
        captured: projections of the running layer, by name.
        views: by group of layers and compaction what their keys are.
    """

    sequence: LayerRun
    visual: Tensor
    sinks: dict[int, Tensor]
    asks: Tensor
    finds: bool
    dimensions: Tensor | None = None
    captured: dict[str, Any] = field(default_factory=dict)
    views: dict[tuple[int, int], LayerView] = field(default_factory=dict)

    @property
    def own_columns(self) -> Tensor:
        """This call's column of every token of the current sequence, int64 `[batch, width]`, -1 at what stands for none."""
        run = self.sequence
        if run.compaction is not None:
            return run.compaction.index
        return torch.arange(run.width, device=run.positions.device).expand(run.batch, -1)

    def mark_sinks(self, layer: int, found: Tensor) -> None:
        """Remember which tokens of the current sequence, bool `[batch, width]`, are sinks of `layer`."""
        known = self.visual.shape[1]
        columns = self.own_columns
        # One more column takes what stands for none.
        places = torch.where(columns >= 0, columns + self.sequence.caller_past, known)
        marked = torch.zeros(found.shape[0], known + 1, dtype=torch.bool, device=self.visual.device)
        marked.scatter_(1, places, found.to(marked.device))
        earlier = self.sinks.get(layer)
        if earlier is not None:
            marked[:, : earlier.shape[1]] |= earlier
        self.sinks[layer] = marked[:, :known]

    def view(self, layer: int, past: int) -> LayerView:
        """Return what the keys and queries of `layer` are, `past` entries being in its cache before this call."""
        run = self.sequence
        group = None if run.state is None else run.state.group(layer)
        at = (-1 if group is None else group.first_layer, id(run.compaction))
        found = self.views.get(at)
        if found is not None:
            return found
        index = None if run.compaction is None else run.compaction.index
        device = self.visual.device
        columns = columns_held(group, run.caller_past, run.batch, index, run.width).to(device)
        visual = (columns >= 0) & (columns < self.visual.shape[1]) & self._of(self.visual, columns)
        valid = run.valid_columns(layer, past)
        flags = VISUAL * visual.to(torch.uint8)
        flags = flags | (VALID if valid is None else VALID * valid.to(torch.uint8))
        own = self.own_columns
        asks = self.asks.gather(1, own.clamp(min=0)) & (own >= 0)
        rows = asks.any(0).nonzero().flatten()
        last = torch.where(asks[:, rows], past + rows, -1)
        view = self.views[at] = LayerView(columns, flags, rows, last)
        return view

    def flags(self, layer: int, view: LayerView, sink: int) -> Tensor:
        """Return `view.flags` with the bit `sink` at the sinks of `layer`."""
        sinks = self.sinks.get(layer)
        if sinks is None:
            return view.flags
        inside = (view.columns >= 0) & (view.columns < sinks.shape[1])
        return view.flags | sink * (inside & self._of(sinks, view.columns)).to(torch.uint8)

    @staticmethod
    def _of(marks: Tensor, columns: Tensor) -> Tensor:
        return marks.gather(1, columns.clamp(0, marks.shape[1] - 1))
