"""ViP-LLaVA: `VipLlavaForConditionalGeneration`, LLaVA-1.5 whose projector takes several layers of the tower."""

from __future__ import annotations

from typing import ClassVar

from .llava import Llava


class VipLlava(Llava):
    """One tile an image, one raster of patch features; the deepest of the feature layers counts as the feature layer."""

    name: ClassVar[str] = "ViP-LLaVA"
    model_classes: ClassVar[tuple[str, ...]] = ("VipLlavaForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ("vipllava",)

    @property
    def has_grid(self) -> bool:
        """True where there is a CLS token: the host drops the first token of the tower, whatever it is."""
        return self.tower_facts.has_cls
