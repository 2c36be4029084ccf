"""Random: a seeded random subset, the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.checks import check_int
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import Need
from vlmprune.methods.selection_macs import Scored


@dataclass(frozen=True, kw_only=True)
class Random(InputMethod):
    """Keep a random subset of the visual tokens.

    The subset depends on the seed and on the number of tokens only, so that an image gives the same answer alone and in any
    batch; vary `seed` to average over subsets.

    Attributes:
        seed: seed of the subset, an int >= 0.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, low=0)

    def select(self, batch: VisualBatch) -> Selection:
        """Draw `budgets[i]` of `counts[i]` tokens for each image."""
        kept = [self._draw(count, budget) for count, budget in zip(batch.counts, batch.budgets, strict=True)]
        return Selection(torch.cat(kept).to(batch.features.device, non_blocking=True), batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """Nothing is computed."""
        return 0

    def _draw(self, count: int, budget: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(count, generator=generator)[:budget].sort().values
