"""Any class that scatters image features into the embeddings of one decoder, with what was found by looking at it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from vlmprune.errors import UnsupportedFamilyError
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.needs import (
    CLS_TOKEN,
    GRID,
    PROJECTOR_LAYERS,
    TOWER_ATTENTION,
    TOWER_BLOCKS,
    TOWER_FEATURES,
    WHOLE_TILES,
    Need,
)

from ..parts import Part
from ..tower.encoded_visuals import EncodedVisuals
from .decoder import decoder_gap, reading_gap
from .family import Family
from .geometry import Geometry, read_geometry
from .shape import ModelShape, read_shape

_MASKS = "create_masks_for_generate"
_TOWER = "which module of this class is the tower, and how its patches become tokens, only a family of its own says"
_NOT_KNOWN: dict[Need, str] = dict.fromkeys(
    (TOWER_ATTENTION, TOWER_FEATURES, PROJECTOR_LAYERS, TOWER_BLOCKS, WHOLE_TILES, CLS_TOKEN), _TOWER
)


class GeneralFamily(Family):
    """Facts that hold for every such class. What only a family of its own can know is missing: methods that need it are refused.

    Attributes:
        shape: what the class was found to be built of.
    """

    name: ClassVar[str] = "general"
    model_classes: ClassVar[tuple[str, ...]] = ()
    model_types: ClassVar[tuple[str, ...]] = ()
    is_general: ClassVar[bool] = True
    parts: ClassVar[tuple[Part, ...]] = tuple(part for part in Family.parts if part.path != "vision_tower")

    @property
    def vision_tower(self) -> nn.Module:
        """Not known."""
        raise UnsupportedFamilyError(f"The vision tower of {type(self.model).__name__} is not known to vlmprune.")

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Return the facts of a tower of which nothing is known."""
        return TowerFacts(0, 0, has_cls=False)

    @property
    def has_tower_attention(self) -> bool:
        """False: the tower is not known."""
        return False

    @cached_property
    def decoder_gap(self) -> str | None:
        """Why tokens cannot be dropped between decoder layers; all of them are tried."""
        maker = next((cls for cls in type(self.model).__mro__ if _MASKS in vars(cls)), None)
        if maker is not None and not issubclass(PreTrainedModel, maker) and maker is not GenerationMixin:
            return f"{maker.__name__} makes attention masks of its own"
        layers = range(self.decoder_layers)
        return decoder_gap(self.language_model, layers) or reading_gap(self.language_model, layers, self._axes)

    @property
    def has_first_layer(self) -> bool:
        """Whether the decoder layers attend as they would be read."""
        return super().has_first_layer and self.has_decoder_layers

    def _axes(self, positions: Tensor) -> Tensor:
        return positions.expand(3, 1, -1) if self.mrope else positions

    @cached_property
    def geometry(self) -> Geometry:
        """How the places of visual tokens are told."""
        return read_geometry(self.multimodal_model, self.language_model, self.config)

    @property
    def has_grid(self) -> bool:
        """True where the processor's grids tell it, or equally large tiles of a tower whose patches lie in a raster."""
        return self.geometry.kind != "unknown"

    def reason(self, need: Need) -> str:
        """Return why the model does not meet a need."""
        if need is GRID:
            return self.geometry.why
        return super().reason(need) or _NOT_KNOWN.get(need, "")

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image or video where one is known and has as many places as there are tokens."""
        return self.geometry.layouts(visuals)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Return nothing: no signal of the tower is served."""
        raise NotImplementedError


def general_family(model: nn.Module) -> type[GeneralFamily]:
    """Return the family of the class of `model`, made of what is found in it.

    Raises:
        UnsupportedFamilyError: names the needed facts that the class lacks.
    """
    shape = read_shape(model)
    if shape.missing:
        raise UnsupportedFamilyError(f"{type(model).__name__} lacks {'; '.join(shape.missing)}.")
    cls: Any = type(model)
    return made_family(cls, shape)


@lru_cache(maxsize=64)
def made_family(cls: Any, shape: ModelShape) -> type[GeneralFamily]:
    """Return a family of the one class `cls`, with the facts of `shape`."""
    facts = {
        "name": cls.__name__.removesuffix("ForConditionalGeneration"),
        "model_classes": (cls.__name__,),
        "multimodal_path": shape.multimodal_path,
        "language_path": shape.language_path,
        "modalities": shape.modalities,
        "mrope": shape.mrope,
        "__module__": __name__,
        "__doc__": f"What was found in {cls.__name__}.",
    }
    return type(f"General{cls.__name__}", (GeneralFamily,), facts)
