"""What the Gemma families have in common."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlmprune.methods.batch import TowerFacts

from .decoder import decoder_gap
from .encoder_tower import EncoderTower


class GemmaBase(EncoderTower):
    """A tower whose last layer gives the features, and a decoder most of whose layers have windows."""

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Facts of the tower: the last layer gives the features."""
        vision = config.vision_config
        depth = int(vision.num_hidden_layers)
        return TowerFacts(depth, depth - 1, has_cls=False, heads=int(vision.num_attention_heads))

    @property
    def has_grid(self) -> bool:
        """Every image is one raster."""
        return True

    @cached_property
    def decoder_gap(self) -> str | None:
        """Why tokens cannot be dropped between decoder layers: most of them attend in windows, some may share keys."""
        return decoder_gap(self.language_model, range(self.decoder_layers))

    @property
    def has_first_layer(self) -> bool:
        """Whether the first decoder layer attends to all tokens before; it has a window in the published models."""
        return super().has_first_layer and decoder_gap(self.language_model, range(1)) is None


def image_blocks(seen: Tensor, columns: int, past: int) -> Tensor:
    """Return the numbers of unbroken runs of image tokens, int64 `[batch, columns]`, -1 elsewhere.

    Args:
        seen: bool `[batch, tokens]`, the image tokens of the whole sequence from its first on, as hosts read it; behind its end
            there are none.
        columns: tokens per row of the call.
        past: tokens before it.
    """
    own = torch.nn.functional.pad(
        seen[:, past : past + columns], (0, max(0, past + columns - max(past, seen.shape[1])))
    )
    before = torch.nn.functional.pad(own, (1, -1))
    return ((own & ~before).cumsum(1) - 1).masked_fill(~own, -1)
