"""What a server has pruned since it started, as Prometheus metrics."""

from __future__ import annotations

from statistics import fmean

from prometheus_client import CollectorRegistry, Counter, Info, generate_latest

from vlmprune.eval.run.cells import Cell
from vlmprune.record import RunRecord


class PruningCounters:
    """Images and their visual tokens before and after pruning, in a registry of their own.

    `vlmprune_images_total`, `vlmprune_visual_tokens_before_total`, `vlmprune_visual_tokens_after_total` (where tokens are dropped
    between layers of the language model, averaged over its layers), and `vlmprune_info` with method and keep.
    """

    def __init__(self, cell: Cell) -> None:
        self.registry = CollectorRegistry()
        self._images = Counter("vlmprune_images", "Images and videos of all prefills", registry=self.registry)
        self._before = Counter(
            "vlmprune_visual_tokens_before", "Their visual tokens without pruning", registry=self.registry
        )
        self._after = Counter(
            "vlmprune_visual_tokens_after",
            "Their visual tokens in a layer of the language model",
            registry=self.registry,
        )
        Info("vlmprune", "What the model is pruned by", registry=self.registry).info(
            {"method": cell.title, "keep": str(cell.keep)}
        )

    def add(self, record: RunRecord) -> tuple[int, float]:
        """Count a prefill; returns its visual tokens before and after pruning."""
        before = sum(record.image_totals)
        after = sum(fmean(layers) for layers in record.visual_tokens_per_layer)
        self._images.inc(len(record.image_totals))
        self._before.inc(before)
        self._after.inc(after)
        return before, after

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
