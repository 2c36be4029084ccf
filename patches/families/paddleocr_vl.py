"""PaddleOCR-VL: `PaddleOCRVLForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.methods.batch import TowerFacts

from ..calls import PIXELS
from ..parts import Part
from ..tower.raster import RasterTowerReader
from ..tower.reader import TowerReader
from .facts import Preparation
from .family import Family
from .qwen_base import QwenVL

_MARKERS = {
    "<|IMAGE_PLACEHOLDER|>": ("image_token_id", "image_token"),
    "<|IMAGE_START|>": ("vision_start_token_id", "image_start_token"),
    "<|IMAGE_END|>": ("vision_end_token_id", "image_end_token"),
}


class PaddleOCRVL(QwenVL):
    """Images alone. The tower takes patches row by row; the projector behind it merges them."""

    name: ClassVar[str] = "PaddleOCR-VL"
    model_classes: ClassVar[tuple[str, ...]] = ("PaddleOCRVLForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    text_positions: ClassVar[bool] = False
    preparation: ClassVar[Preparation] = Preparation(
        "PaddleOCRVLProcessor",
        "PaddleOCRVLImageProcessor",
        None,
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        _MARKERS,
    )
    parts: ClassVar[tuple[Part, ...]] = (
        *Family.parts,
        Part("multimodal_model.get_image_features", (PIXELS["image"], "image_grid_thw")),
    )
    tower_parts: ClassVar[tuple[Part, ...]] = (
        Part("vision_tower", ("grid_thw",)),
        Part("vision_layers.*.self_attn", ("position_embeddings",)),
        *(Part(f"vision_layers.*.self_attn.{name}") for name in ("q_proj", "k_proj", "scaling")),
        *(Part(f"projector.{name}") for name in ("pre_norm", "linear_1", "act", "linear_2")),
    )

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Return the facts of the tower: the last layer gives the features, and there is no CLS token."""
        vision = config.vision_config
        layers, merged = int(vision.num_hidden_layers), int(vision.spatial_merge_size) ** 2
        return TowerFacts(
            layers, layers - 1, has_cls=False, heads=int(vision.num_attention_heads), patches_per_token=merged
        )

    @property
    def vision_layers(self) -> nn.ModuleList:
        """The layers of the tower."""
        return self.vision_tower.vision_model.encoder.layers  # type: ignore[union-attr, return-value]

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `self_attn` of a layer."""
        return self.vision_layers[layer].self_attn  # type: ignore[return-value]

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads the two projections picture by picture."""
        return RasterTowerReader(int(self.config.vision_config.spatial_merge_size))

    @property
    def projector(self) -> nn.Module:
        """What norms patches, puts them side by side, and projects."""
        return self.multimodal_model.projector  # type: ignore[return-value]

    def tower_grids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[tuple[int, int]]:
        """Return rows and columns of patches of each picture."""
        grids: Tensor = kwargs["grid_thw"]
        return [(rows, columns) for frames, rows, columns in grids.tolist() for _ in range(frames)]

    def project(self, features: Tensor) -> Tensor:
        """Turn rows `[rows, patches_per_token * dim]` of the signal "features", of any dtype, into visual tokens."""
        whole: Any = self.projector
        weight = whole.linear_1.weight
        device: Any = features.device if weight.device.type == "meta" else weight.device
        patches = features.to(device, weight.dtype).unflatten(-1, (self.tower_facts.patches_per_token, -1))
        projected: Tensor = whole.linear_2(whole.act(whole.linear_1(whole.pre_norm(patches).flatten(1))))
        return projected.to(features.device)
