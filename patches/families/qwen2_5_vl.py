"""Qwen2.5-VL: `Qwen2_5_VLForConditionalGeneration`."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from ..parts import Part
from ..tower.packed import WindowedTowerReader, window_order
from ..tower.reader import TowerReader
from .facts import Preparation
from .qwen_base import QwenVL, qwen_preparation


class Qwen25VL(QwenVL):
    """A tower that attends inside windows, save in the layers of `fullatt_block_indexes`.

    The last block has full attention in the published models. In a model where it has not, methods that score by it
    compare attention received inside windows.
    """

    name: ClassVar[str] = "Qwen2.5-VL"
    model_classes: ClassVar[tuple[str, ...]] = ("Qwen2_5_VLForConditionalGeneration",)
    text_positions: ClassVar[bool] = False
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    preparation: ClassVar[Preparation] = qwen_preparation("Qwen2_5_VLProcessor")
    tower_parts: ClassVar[tuple[Part, ...]] = (
        *QwenVL.tower_parts,
        Part("vision_tower.window_size"),
        Part("vision_tower.patch_size"),
    )

    def tower_order(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the order by windows."""
        return window_order(tower, args, kwargs)

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads packed sequences and undoes their order by windows."""
        return WindowedTowerReader()
