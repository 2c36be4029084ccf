"""No method at all: every visual token enters the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .batch import Selection, VisualBatch
from .input_method import InputMethod
from .needs import Need
from .selection_macs import Scored


@dataclass(frozen=True, kw_only=True)
class PassThrough(InputMethod):
    """Keep every visual token: what acts at the input where a pipeline has only a method inside the language model."""

    name: ClassVar[str] = "pass_through"
    is_stage: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def budget(self, total: int) -> int:
        """Return `total`."""
        return total

    def select(self, batch: VisualBatch) -> Selection:
        """Keep everything."""
        device = batch.features.device
        return Selection(torch.cat([torch.arange(count, device=device) for count in batch.counts]), batch.counts)

    def feature_macs(self, scored: Scored) -> int:
        """Nothing is computed."""
        return 0
