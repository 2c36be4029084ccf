"""Sinks: visual tokens that attention only rests on leave first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_number
from vlmprune.methods.layer.fastv import share_after_cut
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers
from vlmprune.methods.needs import HIDDEN_AT_CUT, STILL_IMAGES, Need
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.shared.attention_sinks import (
    Dimensions,
    check_dimensions,
    sink_dimensions,
    sink_threshold,
    sink_values,
)

# The layer from which on the paper finds sinks.
_FIRST = 2


@dataclass(frozen=True, kw_only=True)
class Sink(LayerMethod):
    """Drop visual tokens once, those first whose hidden state spikes most: the sink test of VAR as a score.

    A token's score is the highest spike of the hidden state that enters layer `layer`, in units of its root mean square,
    over a few channels. With `keep`, the average over layers, the lowest scores stay; `keep * L = K + (L - K) * share` is
    solved for the share after the cut. Without parameters `keep` is 0.25. With `tau` just the sinks leave, the tokens that
    spike above it, and their number follows from the image; at least the one that spikes least stays.

    The channels are those in which the first token of the row spikes above `tau` (without one above 20, or less where it is
    narrow, see `VAR`), as it does in language models with such sinks, all channels where it does not; published ones go by
    the name of a model. The paper's setting is `Sink(tau=20)`: it is the sinks of VAR, which the paper masks to show that
    accuracy does not change; it proposes no pruning by them.

    Positions: original. An image behind an earlier turn is refused: the row's first token is no longer there to be read.

    Attributes:
        layer: 0-based layer at whose input the tokens are dropped, an int >= 1; None for 2, from which on sinks are there, or 1
            where `keep` cannot be reached at 2.
        tau: the spike above which a token leaves; None where `keep` says how many do.
        dimensions: channels in which sinks spike, the name of a model for published ones ("llama-2-7b", which is LLaVA-1.5-7B's,
            "llama-2-13b", "qwen2-vl-7b", "internvl2-8b"), or None to find them.

    Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv 2503.03321, whose
    sinks these are; the budget is ours.
    """

    layer: int | None = None
    tau: float | None = None
    dimensions: Dimensions = None

    name: ClassVar[str] = "sink"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, HIDDEN_AT_CUT})
    symbols: ClassVar[Mapping[str, str]] = {"D_sink": "dimensions=D_sink"}
    positions = "original"
    # The channels are those of the row's first token, of whose states a cache tells nothing.
    reads_whole_row = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_layers("layer", (self.layer,))
        object.__setattr__(self, "dimensions", check_dimensions(self.dimensions))
        if self.tau is not None:
            check_number("tau", self.tau, "(0, inf)")
            if self.keep is not None:
                raise ParameterError(
                    f"keep={self.keep!r} and tau={self.tau!r} both set the budget; give one of them. keep is the average "
                    "over layers, tau the spike above which a token leaves."
                )
        elif self.keep is None:
            object.__setattr__(self, "keep", 0.25)

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the one layer."""
        check_depth("layer", () if self.layer is None else (self.layer,), layers)
        if isinstance(self.keep, int) and self.layer is None:
            return tuple(sorted({1, min(_FIRST, layers - 1)}))
        cut = self._layer(layers)
        if isinstance(self.keep, float):
            share_after_cut(self.keep, cut, layers)
        return (cut,)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the one cut, without a count where the threshold decides."""
        if self.keep is None:
            return (LayerCut(self._layer(layers), None),)
        if self.keep >= (total if isinstance(self.keep, int) else 1):
            return ()
        cut = self._layer(layers, total)
        share = share_after_cut(self.keep, cut, layers, total)
        return (LayerCut(cut, max(1, round(total * share))),)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Take the lowest scores of each image, or all below the threshold."""
        scores = self.scores(batch)
        if None not in batch.budgets:
            budgets = tuple(budget or 0 for budget in batch.budgets)
            return Selection(segmented_topk(-scores, batch.offsets, budgets), budgets, scores=-scores)
        assert self.tau is not None
        kept = []
        for own in scores.split(list(batch.counts)):
            stays = own <= self.tau
            kept.append((stays if bool(stays.any()) else own == own.amin()).nonzero().flatten())
        return Selection(torch.cat(kept), tuple(len(own) for own in kept))

    def scores(self, batch: LayerBatch) -> Tensor:
        """Return the spike of every visual token, fp32 `[tokens]`.

        Raises:
            ParameterError: a channel that the hidden state does not have.
        """
        hidden = batch.hidden
        assert hidden is not None
        assert self.dimensions is None or isinstance(self.dimensions, tuple)
        rows = torch.arange(len(hidden), device=hidden.device)
        first = torch.zeros_like(rows) if batch.valid is None else batch.valid.int().argmax(1).to(rows.device)
        tau = sink_threshold(self.tau, hidden.shape[-1])
        channels = sink_dimensions(hidden[rows, first], self.dimensions, tau)
        return torch.cat(
            [
                sink_values(hidden[row, columns], channels[row])
                for row, columns in zip(batch.rows, batch.columns, strict=True)
            ]
        )

    def own_macs(self, scored: ScoredLayers) -> int:
        """Norms, which are counted nowhere."""
        return 0

    def _layer(self, layers: int, total: int = 1) -> int:
        if self.layer is not None:
            return self.layer
        average = self.keep / total if isinstance(self.keep, int) else self.keep
        early = layers <= _FIRST or (average is not None and average * layers <= _FIRST)
        return 1 if early else _FIRST
