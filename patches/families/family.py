"""What the engine must know of a model family, as data and a few small functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn

from vlmprune.errors import UnsupportedFamilyError, UnsupportedMethodError
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.needs import DECODER_ATTENTION, FIRST_LAYER, LayerNeed, Need
from vlmprune.methods.projector import ProjectorLayers

from ..calls import PIXELS
from ..parts import Part, missing_parts
from ..tower.dense import DenseTowerReader
from ..tower.encoded_visuals import EncodedVisuals
from ..tower.projector_layers import projector_layers
from ..tower.reader import TowerReader
from .decoder import decoder_gap
from .facts import TOWER_FACTS, PictureKind, Preparation, TowerKind
from .wrappers import without_wrappers

FIRST_LAYER_PARTS = (
    Part("first_layer.input_layernorm"),
    *(Part(f"first_layer.self_attn.{name}") for name in ("q_proj", "k_proj", "head_dim", "scaling")),
)
"""What reading the first decoder layer before it runs relies on."""


class Family:
    """Facts of one model family; a subclass a file, bound to one model.

    Attributes:
        name: the name that messages use.
        model_classes: names of the transformers classes of the family.
        model_types: `model_type` of the configurations whose work is counted without a model; empty where it is not.
        preparation: how prompts with pictures are prepared.
        tower_kind: how the vision tower encodes.
        picture_kind: what the vision tower is given of a picture.
        modalities: what the model encodes, of "image" and "video".
        mrope: whether position ids are 3-D (temporal, height, width).
        text_positions: whether 2-D position ids are to the host the tokens' 1-D positions, which tell packed prompts apart.
        has_tiles: whether images are cut in a thumbnail and crops.
        has_equal_tiles: whether an image is encoded as one or several tiles of one size.
        multimodal_path: from the model to the module that merges image features into the text embeddings; "" is the model itself.
        language_path: from that module to the decoder that it calls.
        vision_projections: children of the attention of a dense tower's layer that give queries and keys.
        is_general: whether the facts were found by looking at the model, and no family of its own knows them.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    model_types: ClassVar[tuple[str, ...]]
    preparation: ClassVar[Preparation]
    tower_kind: ClassVar[TowerKind] = "dense"
    picture_kind: ClassVar[PictureKind] = "one tile"
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    mrope: ClassVar[bool] = False
    text_positions: ClassVar[bool] = True
    has_tiles: ClassVar[bool] = False
    has_equal_tiles: ClassVar[bool] = False
    multimodal_path: ClassVar[str] = "model"
    language_path: ClassVar[str] = "language_model"
    vision_projections: ClassVar[tuple[str, str]] = ("q_proj", "k_proj")
    is_general: ClassVar[bool] = False

    parts: ClassVar[tuple[Part, ...]] = (
        Part("multimodal_model", ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")),
        Part("multimodal_model.get_input_embeddings"),
        Part("language_model", ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")),
        Part("vision_tower"),
    )
    """What the hooks rely on in every model of the family, from the family on."""
    tower_parts: ClassVar[tuple[Part, ...]] = ()
    """What reading the vision tower relies on beside them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config

    def check(self) -> None:
        """Raise UnsupportedFamilyError if the model lacks something that the hooks rely on; names all of it."""
        encoders = [
            part
            for modality in self.modalities
            for part in (
                Part(f"config.{modality}_token_id"),
                # What it calls the pixels differs: those of videos are `pixel_values` to LLaVA-OneVision in transformers 5.17.
                Part(f"multimodal_model.get_{modality}_features"),
                Part("multimodal_model", (PIXELS[modality],)),
            )
        ]
        missing = missing_parts(self, (*self.parts, *encoders))
        if missing:
            raise UnsupportedFamilyError(
                f"This {type(self.model).__name__} lacks what vlmprune relies on in {self.name} models: {'; '.join(missing)}. "
                f"transformers {transformers.__version__} may have changed it; supported: 5.17 and later 5.x."
            )

    def check_tower(self) -> None:
        """Raise UnsupportedMethodError if the vision tower lacks something that reading it relies on; names all of it."""
        missing = missing_parts(self, self.tower_parts)
        if missing:
            raise UnsupportedMethodError(
                f"The vision tower {type(self.vision_tower).__name__} cannot be read: {'; '.join(missing)}."
            )

    @cached_property
    def multimodal_model(self) -> nn.Module:
        """The module that merges image features into the text embeddings and calls the language model."""
        return _submodule(self.model, self.multimodal_path)

    @cached_property
    def language_model(self) -> nn.Module:
        """The decoder whose input is compacted."""
        return _submodule(self.multimodal_model, self.language_path)

    @property
    def first_layer(self) -> nn.Module:
        """The first decoder layer."""
        return without_wrappers(self.language_model.layers[0])  # type: ignore[index, arg-type]

    @property
    def decoder_layers(self) -> int:
        """Number of language-model layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Return whether the family is that of a model of one of its classes, by its configuration."""
        return True

    def placeholder_id(self, modality: str) -> int:
        """Return the id of the token that stands for one visual token of an image or a video."""
        return int(getattr(self.config, f"{modality}_token_id"))

    def check_encoding(self, modality: str, inputs: Mapping[str, Any]) -> None:
        """Raise LayoutError for arguments of `get_{modality}_features`, by name, that the host would not refuse clearly."""

    def attention_blocks(self, inputs: Mapping[str, Any], columns: int, past: int) -> Tensor | None:
        """Return the block of tokens that see each other both ways, int64 `[batch, columns]`, -1 for none.

        None where the family does not know; the blocks are then read of the mask that the host made, if it made one.

        Args:
            inputs: the arguments of the model's forward by name.
            columns: tokens per row of the call.
            past: tokens of the caller's sequence before it.
        """
        return None

    def changed_features(self, inputs: Mapping[str, Any]) -> str | None:
        """Return which argument of `get_{modality}_features`, by name, takes other layers than configured, or None."""
        return None

    def feature_items(self, modality: str, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the features of each image or video, given what `get_{modality}_features` returns as `pooler_output`."""
        return features

    def token_counts(self, modality: str, features: Sequence[Tensor]) -> tuple[int, ...]:
        """Return the visual tokens of each image or video, given the features of each."""
        return tuple(math.prod(feature.shape[:-1]) for feature in features)

    @property
    def vision_tower(self) -> nn.Module:
        """The module whose forward encodes the tiles and whose output carries the features."""
        raise NotImplementedError

    @cached_property
    def tower_reader(self) -> TowerReader:
        """How attention of the vision tower is read; by default from layers with `q_proj` and `k_proj`."""
        return DenseTowerReader()

    def vision_attention(self, layer: int) -> nn.Module:
        """Return the attention module of a vision tower layer."""
        raise NotImplementedError

    def vision_layer(self, layer: int) -> nn.Module:
        """Return a vision tower layer, whose output is a hidden state `[tiles, tokens, dim]`."""
        raise NotImplementedError

    @property
    def state_layers(self) -> tuple[int, ...]:
        """0-based indices of the vision tower layers whose outputs, side by side, the projector gets."""
        return (self.tower_facts.feature_layer,)

    @property
    def has_projector(self) -> bool:
        """Whether the family names its projector."""
        return type(self).projector is not Family.projector

    @property
    def has_projector_layers(self) -> bool:
        """Whether the projector is two linear layers whose weights are at hand."""
        try:
            return self.has_projector and bool(self.projector_layers())
        except UnsupportedMethodError:
            return False

    def projector_layers(self) -> ProjectorLayers:
        """Return the weights of the projector.

        Raises:
            UnsupportedMethodError: it is built otherwise, or its weights are not at hand.
        """
        return projector_layers(self.projector, self.tower_facts.patches_per_token)

    @property
    def projector(self) -> nn.Module:
        """The module that turns features of the vision tower into visual tokens."""
        raise NotImplementedError

    @property
    def vision_heads(self) -> int:
        """Number of attention heads of the vision tower."""
        return self.tower_facts.heads

    @classmethod
    def tower_facts_of(cls, config: Any) -> TowerFacts:
        """Return the facts of the vision tower that a configuration describes."""
        return TOWER_FACTS[cls.tower_kind](config)

    @cached_property
    def tower_facts(self) -> TowerFacts:
        """Layers of the vision tower, the one that gives the features, and whether there is a CLS token."""
        return self.tower_facts_of(self.config)

    @property
    def has_tower_attention(self) -> bool:
        """Whether attention of the vision tower can be read."""
        return True

    @property
    def has_tower_blocks(self) -> bool:
        """Whether tokens can be reduced in the blocks of the vision tower; False unless the family says otherwise."""
        return False

    @property
    def has_packed_blocks(self) -> bool:
        """Whether the vision tower packs pictures, and tokens can be reduced in its blocks; False unless the family says so."""
        return False

    @property
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation by colour that the processor of a family with packed patches takes pixels by."""
        raise NotImplementedError

    def tower_order(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the raster place of the visual token at each place of a packed tower's order, by the arguments of its call.

        None where they are the same.
        """
        return None

    def tower_grids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[tuple[int, int]]:
        """Return rows and columns of patches of each picture of a call of a tower that merges none, by its arguments."""
        raise NotImplementedError

    @property
    def has_free_order(self) -> bool:
        """Whether every image is one tile, whose visual tokens may be fewer and need no grid; False unless the family says so."""
        return False

    @property
    def has_first_layer(self) -> bool:
        """Whether queries and keys of the first decoder layer can be read."""
        return not missing_parts(self, FIRST_LAYER_PARTS)

    @cached_property
    def decoder_gap(self) -> str | None:
        """Why tokens cannot be dropped between decoder layers, in words; None where they can."""
        # What a method needs of the layers before the last is checked once it says which it cuts.
        last = decoder_gap(self.language_model, range(self.decoder_layers - 1, self.decoder_layers))
        return last and decoder_gap(self.language_model, range(self.decoder_layers))

    def reason(self, need: Need) -> str:
        """Return why the model does not meet a need, in words; nothing where the need itself says all."""
        of_layers = isinstance(need, LayerNeed) or need in (FIRST_LAYER, DECODER_ATTENTION)
        return (self.decoder_gap or "") if of_layers else ""

    @property
    def has_decoder_layers(self) -> bool:
        """Whether tokens can be dropped between the decoder layers, and their attention be read."""
        return self.decoder_gap is None

    @property
    def has_grid(self) -> bool:
        """Whether every image is one plain grid of tokens, as pooling needs it."""
        raise NotImplementedError

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return the layout of each encoded image or video."""
        raise NotImplementedError

    def tile_counts(self, visuals: EncodedVisuals) -> tuple[int, ...]:
        """Return how many tiles the tower encoded of each image or video."""
        return (1,) * len(visuals.counts)

    def token_vision(self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]) -> Tensor:
        """Turn a signal as the tower reader gives it into one per visual token, fp32 `[sum(counts), channels]`, 0 at newlines."""
        raise NotImplementedError

    def tile_vision(
        self, signal: Tensor, visuals: EncodedVisuals, layouts: Sequence[VisualLayout]
    ) -> tuple[Tensor, ...]:
        """Return per image the signal on all of its tiles, padding included, `[tiles, tile rows * tile columns, channels]`."""
        return tuple(part[None] for part in self.token_vision(signal, visuals, layouts).split(list(visuals.counts)))

    def tile_rows(self, signal: Tensor, layouts: Sequence[VisualLayout]) -> tuple[Tensor, ...]:
        """Return per image the rows of its tiles, `[tiles, channels]`, of a signal that has a row a tile."""
        return signal.split([1] * len(layouts))

    def project(self, features: Tensor) -> Tensor:
        """Turn rows `[rows, patches_per_token * dim]` of the signal "features", of any dtype, into visual tokens."""
        parameter = next(self.projector.parameters())
        device = features.device if parameter.device.type == "meta" else parameter.device
        rows = features.to(device, parameter.dtype).view(-1, features.shape[-1] // self.tower_facts.patches_per_token)
        projected: Tensor = self.projector(rows)
        return projected.to(features.device)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        module = without_wrappers(getattr(module, name))
    return module
