"""What the engine must know of a model family, as data and a few small functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmprune.layout import VisualLayout
from vlmprune.methods.visual_batch import TowerFacts


class Family:
    """Facts of one model family; a subclass a file, bound to one model.

    Attributes:
        name: the name that messages use.
        model_classes: names of the transformers classes of the family.
        mrope: whether position ids are 3-D (temporal, height, width).
        has_tiles: whether images are cut in a thumbnail and crops.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    mrope: ClassVar[bool] = False
    has_tiles: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config

    @property
    def multimodal_model(self) -> nn.Module:
        """The module that merges image features into the text embeddings and calls the language model."""
        return self.model.model  # type: ignore[return-value]

    @property
    def language_model(self) -> nn.Module:
        """The decoder whose input is compacted."""
        return self.multimodal_model.language_model  # type: ignore[return-value]

    @property
    def decoder_layers(self) -> int:
        """Number of language-model layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder token that stands for one visual token."""
        return int(self.config.image_token_id)

    @property
    def vision_tower(self) -> nn.Module:
        """The module whose forward encodes the tiles and whose output carries the features."""
        raise NotImplementedError

    def vision_attention(self, layer: int) -> nn.Module:
        """Return the attention module (with `q_proj` and `k_proj`) of a vision tower layer."""
        raise NotImplementedError

    @property
    def vision_heads(self) -> int:
        """Number of attention heads of the vision tower."""
        raise NotImplementedError

    @property
    def tower_facts(self) -> TowerFacts:
        """Layers of the vision tower, the one that gives the features, and whether there is a CLS token."""
        raise NotImplementedError

    @property
    def has_grid(self) -> bool:
        """Whether every image is one plain grid of tokens, as pooling needs it."""
        raise NotImplementedError

    def layouts(self, counts: Sequence[int], image_outputs: Any, inputs: Mapping[str, Any]) -> tuple[VisualLayout, ...]:
        """Return the layout of each image, given its number of visual tokens."""
        raise NotImplementedError

    def image_vision(self, signal: Tensor, counts: Sequence[int]) -> Tensor:
        """Turn a signal per tile `[tiles, tokens, heads]` into one per visual token `[sum(counts), heads]`."""
        raise NotImplementedError
