"""Mistral 3: `Mistral3ForConditionalGeneration` with a Pixtral tower."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from ..parts import Part
from ..tower.raster import UnfoldedTowerReader
from ..tower.reader import TowerReader
from .facts import Preparation
from .pixtral import PixtralTower


class Mistral3(PixtralTower):
    """Patches are merged 2 x 2 by a linear layer; rows of visual tokens end with break tokens, which are text here."""

    name: ClassVar[str] = "Mistral 3"
    model_classes: ClassVar[tuple[str, ...]] = ("Mistral3ForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[Preparation] = Preparation("PixtralProcessor", "PixtralImageProcessor")
    tower_parts: ClassVar[tuple[Part, ...]] = (
        *PixtralTower.tower_parts,
        *(Part(f"multimodal_model.multi_modal_projector.{name}") for name in ("linear_1", "act", "linear_2")),
    )

    @classmethod
    def merge_side(cls, config: Any) -> int:
        """Return `spatial_merge_size`."""
        return int(config.spatial_merge_size)

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads the two projections picture by picture, and what is merged."""
        return UnfoldedTowerReader(self.merge_side(self.config))

    @property
    def projector(self) -> nn.Module:
        """The linear layer over the patches of a token; two more follow it."""
        return self.multimodal_model.multi_modal_projector.patch_merger.merging_layer  # type: ignore[union-attr, return-value]

    def project(self, features: Tensor) -> Tensor:
        """Turn rows `[rows, patches_per_token * dim]` of the signal "features", of any dtype, into visual tokens."""
        whole: Any = self.multimodal_model.multi_modal_projector
        weight: Tensor = whole.patch_merger.merging_layer.weight
        device: Any = features.device if weight.device.type == "meta" else weight.device
        patches = features.to(device, weight.dtype).unflatten(-1, (self.tower_facts.patches_per_token, -1))
        merged = self.projector(patches.transpose(1, 2).flatten(1))
        projected: Tensor = whole.linear_2(whole.act(whole.linear_1(merged)))
        return projected.to(features.device)
