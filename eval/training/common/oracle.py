"""The foreground oracle: pruning that keeps exactly the visual tokens that show a thing or a glyph.

A model on which it loses much leans on the background, and punishes methods for choosing well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

import vlmprune
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import Need
from vlmprune.methods.selection_macs import Scored


@dataclass(frozen=True, kw_only=True)
class Foreground(InputMethod):
    """Keep the tokens that a mask names.

    Attributes:
        masks: for each image of the call, which of its visual tokens stay, bool `[tokens]`.
    """

    masks: tuple[Tensor, ...] = ()

    name: ClassVar[str] = "foreground"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def select(self, batch: VisualBatch) -> Selection:
        """Take what the masks say."""
        kept = [mask.nonzero().flatten() for mask in self.masks]
        return Selection(torch.cat(kept).to(batch.features.device), tuple(map(len, kept)))

    def feature_macs(self, scored: Scored) -> int:
        """Nothing is computed."""
        return 0


@contextmanager
def only_foreground(model: PreTrainedModel, masks: Sequence[Tensor]) -> Iterator[None]:
    """Keep what the masks of the images of the calls in the body say."""
    with (
        vlmprune.pruned(model, Foreground(masks=tuple(masks))),
        vlmprune.options(model, keep=[int(mask.sum()) for mask in masks]),
    ):
        yield


@contextmanager
def random_of_same_count(model: PreTrainedModel, masks: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Keep as many tokens as the masks of the images of the calls in the body do, drawn at random."""
    with (
        vlmprune.pruned(model, "random", seed=seed),
        vlmprune.options(model, keep=[int(mask.sum()) for mask in masks]),
    ):
        yield
