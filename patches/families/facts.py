"""Facts of a family that a configuration alone tells, without a model: what methods ask of its vision tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmprune.methods.batch import TowerFacts

TowerKind = Literal["dense", "packed"]
"""Towers over tiles of one size, with queries and keys projected apart, or over pictures of any size in one packed sequence."""
PictureKind = Literal["one tile", "tiles", "tiles of single pictures", "grids"]
"""What a tower is given of a picture: itself, a thumbnail and crops (only of a picture that is alone in its prompt), a grid."""

_CLS_TOWERS = ("clip", "mlcd")
"""Parts of the `model_type` of towers whose token 0 is a CLS token; SigLIP's say "siglip" and have none."""


@dataclass(frozen=True)
class Preparation:
    """How transformers prepares a prompt with a picture.

    Attributes:
        processor: name of the processor's class.
        image_processor: name of the image processor's class.
        video_processor: name of the video processor's class, if the processor takes one.
        picture: what stands for a picture in a prompt.
        markers: for each marker the attribute of the configuration that has its id, and the tokenizer's name for it.
    """

    processor: str
    image_processor: str
    video_processor: str | None = None
    picture: str = "<image>"
    markers: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {
            "<image>": ("image_token_id", "image_token"),
            "<video>": ("video_token_id", "video_token"),
        }
    )

    @property
    def video(self) -> str | None:
        """What stands for a video in a prompt, if the processor takes one."""
        return None if self.video_processor is None else self.picture.replace("image", "video")


def has_cls(config: Any) -> bool:
    """Whether token 0 of the vision tower is a CLS token."""
    return any(name in config.vision_config.model_type for name in _CLS_TOWERS)


def drops_cls(config: Any) -> bool:
    """Whether the first token of the tower is left out of the features."""
    return getattr(config, "vision_feature_select_strategy", "default") == "default"


def tower_width(config: Any) -> int:
    """Width of the vision tower's hidden states."""
    vision = config.vision_config
    return int(getattr(vision, "embed_dim", None) or vision.hidden_size)


def state_layers(config: Any, chosen: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """0-based layers of a dense tower whose outputs make the features; -1 stands for the embeddings before the first layer.

    Args:
        config: the model's configuration.
        chosen: indices of hidden states other than the configured ones.
    """
    if chosen is None:
        # ViP-LLaVA has both names in newer versions; the older one is what all of them know.
        chosen = getattr(config, "vision_feature_layers", None)
        chosen = config.vision_feature_layer if chosen is None else chosen
    depth = int(config.vision_config.num_hidden_layers)
    states = [chosen] if isinstance(chosen, int) else list(chosen)
    return tuple((state if state >= 0 else depth + 1 + state) - 1 for state in states)


def dense_tower_facts(config: Any) -> TowerFacts:
    """Facts of a tower over tiles; with several feature layers the deepest counts as the feature layer."""
    vision = config.vision_config
    deepest = max(0, *state_layers(config))
    return TowerFacts(int(vision.num_hidden_layers), deepest, has_cls(config), heads=int(vision.num_attention_heads))


def packed_tower_facts(config: Any) -> TowerFacts:
    """Facts of a tower over packed pictures: the last layer gives the features, and there is no CLS token."""
    vision = config.vision_config
    depth, merged = int(vision.depth), int(vision.spatial_merge_size) ** 2
    return TowerFacts(depth, depth - 1, has_cls=False, heads=int(vision.num_heads), patches_per_token=merged)


TOWER_FACTS: dict[TowerKind, Callable[[Any], TowerFacts]] = {"dense": dense_tower_facts, "packed": packed_tower_facts}
