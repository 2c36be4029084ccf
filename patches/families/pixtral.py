"""Pixtral: a tower over pictures of any size in one sequence; as `LlavaForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import LayoutError
from vlmprune.layout import VisualLayout, raster_layout, unknown_layout
from vlmprune.methods.batch import TowerFacts

from ..calls import PIXELS
from ..parts import Part
from ..tower.encoded_visuals import EncodedVisuals
from ..tower.raster import RasterTowerReader
from ..tower.reader import TowerReader
from .facts import PictureKind, Preparation, TowerKind, dense_tower_facts
from .family import Family
from .llava import Llava
from .qwen_base import QwenVL


class PixtralTower(Llava):
    """Pictures of any size, one raster of visual tokens each."""

    tower_kind: ClassVar[TowerKind] = "packed"
    picture_kind: ClassVar[PictureKind] = "grids"
    has_equal_tiles: ClassVar[bool] = False
    tower_parts: ClassVar[tuple[Part, ...]] = (
        Part("vision_tower", ("image_sizes",)),
        Part("vision_layers.*.attention", ("position_embeddings",)),
        Part("vision_layers.*.attention.q_proj"),
        Part("vision_layers.*.attention.k_proj"),
        Part("vision_layers.*.attention.scaling"),
        Part("projector"),
    )
    token_vision = QwenVL.token_vision

    @classmethod
    def merge_side(cls, config: Any) -> int:
        """Patches along the side of a visual token."""
        return 1

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Return the facts of the tower, which has no CLS token."""
        return replace(dense_tower_facts(config), has_cls=False, patches_per_token=cls.merge_side(config) ** 2)

    @property
    def vision_layers(self) -> nn.ModuleList:
        """The layers of the tower."""
        return self.vision_tower.transformer.layers  # type: ignore[union-attr, return-value]

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `attention` of a layer."""
        return self.vision_layers[layer].attention  # type: ignore[return-value]

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads the two projections picture by picture."""
        return RasterTowerReader(self.merge_side(self.config))

    @property
    def has_tower_attention(self) -> bool:
        """True for Pixtral's tower."""
        return isinstance(getattr(getattr(self.vision_tower, "transformer", None), "layers", None), nn.ModuleList)

    @property
    def has_tower_blocks(self) -> bool:
        """False: its blocks are others than those of CLIP, and of Qwen-VL."""
        return False

    @property
    def has_grid(self) -> bool:
        """Every image is one plain raster."""
        return True

    def check(self) -> None:
        """Check the parts."""
        Family.check(self)

    def tower_grids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[tuple[int, int]]:
        """Return rows and columns of patches of each picture: by `image_sizes`, without them by the pixels."""
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        sizes = kwargs.get("image_sizes")
        if sizes is None:
            sizes = [pixels.shape[-2:]] * len(pixels)
        patch = int(self.config.vision_config.patch_size)
        return [(rows // patch, columns // patch) for rows, columns in torch.as_tensor(sizes).tolist()]

    def check_encoding(self, modality: str, inputs: Mapping[str, Any]) -> None:
        """Check that pictures have sizes of which whole tokens can be made.

        Raises:
            LayoutError: several pictures without sizes, or a size that is no multiple.
        """
        pixels, sizes = inputs.get(PIXELS[modality]), inputs.get("image_sizes")
        if sizes is None:
            if isinstance(pixels, Tensor) and len(pixels) > 1:
                raise LayoutError(
                    f"{PIXELS[modality]} holds {len(pixels)} pictures and came without image_sizes, by which their tokens are "
                    "told apart; needed: the processor's tensor of shape [images, 2]."
                )
            return
        side = int(self.config.vision_config.patch_size) * self.merge_side(self.config)
        for number, (rows, columns) in enumerate(torch.as_tensor(sizes).tolist()):
            if rows < side or columns < side or (side > 1 and (rows % side or columns % side)):
                raise LayoutError(
                    f"Image {number} has {rows} x {columns} pixels in image_sizes; allowed: multiples of {side}, as the "
                    "processor's `patch_size` and `spatial_merge_size` make them."
                )

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image; of unknown geometry where an image came without its size.

        Raises:
            LayoutError: the sizes do not give the number of tokens that were encoded.
        """
        sizes = visuals.inputs.get("image_sizes")
        if sizes is None:
            return tuple(unknown_layout(count) for count in visuals.counts)
        side = int(self.config.vision_config.patch_size) * self.merge_side(self.config)
        sizes = torch.as_tensor(sizes).tolist()
        layouts = tuple(raster_layout(rows // side, columns // side) for rows, columns in sizes)
        if tuple(layout.total for layout in layouts) != visuals.counts:
            raise LayoutError(
                f"image_sizes {sizes} stands for {[layout.total for layout in layouts]} visual tokens, the vision tower made "
                f"{list(visuals.counts)}."
            )
        return layouts


class LlavaPixtral(PixtralTower):
    """Pixtral-12B and its like: a patch is a visual token; rows end with break tokens, which are text here."""

    name: ClassVar[str] = "Pixtral"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ()
    preparation: ClassVar[Preparation] = Preparation("PixtralProcessor", "PixtralImageProcessor")

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Return whether the tower is Pixtral's."""
        return bool(config.vision_config.model_type == "pixtral")
