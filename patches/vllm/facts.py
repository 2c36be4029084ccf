"""The model families as vLLM builds them: the facts of transformers' families where its modules are called alike."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from vlmprune.errors import UnsupportedFamilyError

from ..families.family import Family
from ..families.llava import Llava
from ..families.llava_next import LlavaNext
from ..families.llava_onevision import LlavaOnevision
from ..families.qwen2_5_vl import Qwen25VL
from ..families.qwen2_vl import Qwen2VL
from ..families.qwen3_vl import Qwen3VL
from ..families.qwen_base import QwenVL
from ..tower.reader import TowerReader
from .readers import DenseReader, PackedReader, WindowedReader

TILE_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""`model_type` of the towers over tiles of one size that can be read."""

VLLM_ASPECT_RATIO = "anyres_max_9"


class VllmFamily(Family):
    """What holds for all of them. The facts that methods are checked by are told by the configuration alone."""

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    multimodal_path: ClassVar[str] = ""
    decoder_gap: ClassVar[str] = "the layers of the language model are vLLM's own"

    @property
    def has_first_layer(self) -> bool:
        """False: the layers of the language model are vLLM's own."""
        return False

    @property
    def has_tower_blocks(self) -> bool:
        """False: those of the vision tower are, too."""
        return False

    @property
    def has_packed_blocks(self) -> bool:
        """False for the same reason."""
        return False

    @property
    def has_projector_layers(self) -> bool:
        """False: its linear layers are vLLM's own."""
        return False

    def check_tower_kind(self) -> None:
        """Raise UnsupportedFamilyError if the vision tower is of a kind that is not served; all are by default."""

    @property
    def built_layers(self) -> int:
        """How many layers of the vision tower vLLM builds."""
        return self.tower_facts.layers

    @classmethod
    def image_grid(cls, config: Any, item: Any, total: int) -> tuple[int, int] | None:
        """Return rows and columns of an image's `total` visual tokens, from its processed item; None where there is no grid."""
        return None


class VllmTiles(VllmFamily):
    """CLIP and SigLIP towers over tiles."""

    def check_tower_kind(self) -> None:
        """Raise UnsupportedFamilyError for other towers, Pixtral's say."""
        kind = self.config.vision_config.model_type
        if kind not in TILE_TOWERS:
            raise UnsupportedFamilyError(
                f"{self.name} models with a vision tower of type {kind!r} are not served with pruning by vLLM; served: "
                f"{', '.join(TILE_TOWERS)}."
            )

    @property
    def built_layers(self) -> int:
        """Those up to the last that gives features."""
        return self.tower_facts.feature_layer + 1

    @property
    def has_tower_attention(self) -> bool:
        """True for these towers."""
        return self.config.vision_config.model_type in TILE_TOWERS

    @property
    def has_projector(self) -> bool:
        """True for these towers."""
        return self.has_tower_attention

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads what enters vLLM's attention."""
        return DenseReader()


class VllmLlava(VllmTiles, Llava):
    """LLaVA-1.5."""

    @classmethod
    def image_grid(cls, config: Any, item: Any, total: int) -> tuple[int, int] | None:
        """Return the square."""
        side = round(total**0.5)
        return (side, side) if side * side == total else None


class VllmLlavaNext(VllmTiles, LlavaNext):
    """LLaVA-NeXT."""


class VllmLlavaOnevision(VllmTiles, LlavaOnevision):
    """LLaVA-OneVision; vLLM cuts every image in crops, whatever else its prompt shows."""

    def check_tower_kind(self) -> None:
        """Raise UnsupportedFamilyError also where images are interpolated at another size than vLLM interpolates them at."""
        super().check_tower_kind()
        if self.config.vision_aspect_ratio != VLLM_ASPECT_RATIO:
            raise UnsupportedFamilyError(
                f"vision_aspect_ratio={self.config.vision_aspect_ratio!r}: vLLM reads every {self.name} model as "
                f"{VLLM_ASPECT_RATIO!r}, so places would be wrong; allowed: {VLLM_ASPECT_RATIO!r}."
            )


class VllmQwen(VllmFamily, QwenVL):
    """The Qwen-VL models."""

    @property
    def decoder_layers(self) -> int:
        """Number of language-model layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads what enters vLLM's attention."""
        return PackedReader()

    def vision_attention(self, layer: int) -> nn.Module:
        """Return `attn` of a block."""
        return self.vision_tower.blocks[layer].attn  # type: ignore[index, union-attr]

    @classmethod
    def image_grid(cls, config: Any, item: Any, total: int) -> tuple[int, int] | None:
        """Return the grid of merged patches."""
        _, rows, columns = item["image_grid_thw"].data.tolist()
        merge = int(config.vision_config.spatial_merge_size)
        return rows // merge, columns // merge


class VllmQwen2VL(VllmQwen, Qwen2VL):
    """Qwen2-VL."""


class VllmQwen25VL(VllmQwen, Qwen25VL):
    """Qwen2.5-VL."""

    @property
    def has_projector(self) -> bool:
        """False: vLLM calls the merger past its hooks, for it may be compiled."""
        return False

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads what enters vLLM's attention, and undoes the order by windows."""
        return WindowedReader()


class VllmQwen3VL(VllmQwen, Qwen3VL):
    """Qwen3-VL."""
