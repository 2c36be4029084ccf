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
from ..tower.reader import TowerReader
from .decoder import decoder_gap, reading_gap
from .facts import TowerKind
from .family import Family
from .geometry import Geometry, read_geometry
from .qwen_base import QwenVL
from .shape import ModelShape, read_shape
from .shuffled_tiles import cell_vision
from .towers import FoundTower, find_tower
from .wrappers import without_wrappers

_MASKS = "create_masks_for_generate"
# Of a tile, in the configurations of some classes.
_TILE_TOKENS = ("image_seq_length", "image_seq_len", "mm_tokens_per_image", "num_image_tokens")
# Patches along the side of a visual token.
_CELL_SIDES = ("downsample_factor", "scale_factor")
_TOWER = "how the class makes visual tokens of what its tower gives only a family of its own says"
_NOT_KNOWN: dict[Need, str] = dict.fromkeys((TOWER_FEATURES, PROJECTOR_LAYERS, TOWER_BLOCKS, WHOLE_TILES), _TOWER)


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

    @cached_property
    def found_tower(self) -> FoundTower | str:
        """The tower, where it is of a known kind; else why it is not, in words."""
        geometry = self.geometry
        if geometry.kind == "unknown":
            return geometry.why
        return find_tower(
            self.multimodal_model, self.config, self._tile_tokens() if geometry.kind == "square" else None
        )

    def _tile_tokens(self) -> int | None:
        """Visual tokens of a tile, as the class's configuration or its tower's patches tell."""
        side = self.geometry.side
        for name in _TILE_TOKENS:
            given = getattr(self.config, name, None) or getattr(self.config.get_text_config(), name, None)
            if isinstance(given, int) and 0 < given <= side**2:
                return given
        cell = next((getattr(self.config, name, None) for name in _CELL_SIDES if hasattr(self.config, name)), 1)
        return (side // cell) ** 2 if isinstance(cell, int) and side % cell == 0 else None

    @property
    def vision_tower(self) -> nn.Module:
        """The tower.

        Raises:
            UnsupportedFamilyError: it is not known.
        """
        tower = self.found_tower
        if isinstance(tower, str):
            raise UnsupportedFamilyError(
                f"The vision tower of {type(self.model).__name__} is not known to vlmprune: {tower}."
            )
        return without_wrappers(getattr(self.multimodal_model, tower.path))

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Return the facts of a tower of which nothing is known."""
        return TowerFacts(0, 0, has_cls=False)

    @cached_property
    def tower_facts(self) -> TowerFacts:
        """Facts of the tower, as it was found."""
        tower = self.found_tower
        return self.tower_facts_of(self.config) if isinstance(tower, str) else tower.facts

    @property
    def has_tower_attention(self) -> bool:
        """Whether the tower is of a known kind, and its attention is what would be read of it."""
        return not isinstance(self.found_tower, str)

    @property
    def tower_kind(self) -> TowerKind:  # type: ignore[override]
        """Whether the tower that was found packs its pictures."""
        tower = self.found_tower
        return "dense" if isinstance(tower, str) else tower.kind

    @cached_property
    def tower_reader(self) -> TowerReader:
        """Reads a tower of the kind that was found."""
        tower = self.found_tower
        return super().tower_reader if isinstance(tower, str) else tower.reader(self.vision_tower)

    def vision_attention(self, layer: int) -> nn.Module:
        """Return the attention module of a tower layer."""
        tower = self.found_tower
        assert not isinstance(tower, str)
        return without_wrappers(tower.layers[layer]).get_submodule(tower.attention)

    def vision_layer(self, layer: int) -> nn.Module:
        """Return a tower layer."""
        tower = self.found_tower
        assert not isinstance(tower, str)
        return tower.layers[layer]

    @property
    def vision_projections(self) -> tuple[str, str]:  # type: ignore[override]
        """What gives queries and keys in the attention of the tower that was found."""
        tower = self.found_tower
        return Family.vision_projections if isinstance(tower, str) else tower.projections

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
        if need in (TOWER_ATTENTION, CLS_TOKEN) and isinstance(self.found_tower, str):
            return self.found_tower
        return super().reason(need) or _NOT_KNOWN.get(need, "")

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image or video where one is known and has as many places as there are tokens."""
        return self.geometry.layouts(visuals)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Return the signal of each visual token; of a dense tower without its CLS column, averaged over cells of patches.

        Raises:
            LayoutError: the tower scored another number of tokens.
        """
        if not isinstance(self.found_tower, str) and self.found_tower.kind == "packed":
            return QwenVL.token_vision(self, signal, visuals, layouts)  # type: ignore[arg-type]
        cls, cells = self.tower_facts.has_cls, max(1, visuals.counts[0])
        return cell_vision(signal, visuals.counts, max(1, round(((signal.shape[1] - cls) / cells) ** 0.5)), cls)


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
