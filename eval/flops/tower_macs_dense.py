"""Cost of CLIP and SigLIP towers, which take pictures of one size, and of LLaVA's projectors."""

from __future__ import annotations

from transformers import PreTrainedConfig

from vlmprune.patches.families.facts import drops_cls, has_cls, state_layers

from .vision_work import VisionWork


def dense_tower_macs(config: PreTrainedConfig, work: VisionWork) -> tuple[int, int]:
    """MACs of a CLIP or SigLIP tower and of a two-layer projector for `work.crops` pictures.

    The whole tower runs, layers after the one that gives the features included, as in transformers.
    """
    vision = config.vision_config
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = patches + has_cls(config)
    tower = patches * hidden * vision.num_channels * vision.patch_size**2
    tower += vision.num_hidden_layers * (tokens * (4 * hidden * hidden + 2 * hidden * ffn) + 2 * tokens**2 * hidden)
    if vision.model_type.startswith("siglip") and getattr(vision, "vision_use_head", True):
        tower += 2 * hidden * hidden + 2 * tokens * hidden * hidden + 2 * tokens * hidden + 2 * hidden * ffn
    projected = tokens - (has_cls(config) and drops_cls(config))
    return work.crops * tower, work.crops * projected * dense_projector_macs(config)


def dense_projector_macs(config: PreTrainedConfig) -> int:
    """MACs of a two-layer projector for one token."""
    text = config.get_text_config().hidden_size
    width = config.vision_config.hidden_size * len(state_layers(config))
    return int(width * text + text * text)


def dense_projector_hidden(config: PreTrainedConfig) -> int:
    """Width between the layers of the projector."""
    return int(config.get_text_config().hidden_size)


def dense_segments(config: PreTrainedConfig, work: VisionWork, layer: int) -> list[int]:
    """Tokens of every picture: each attends to itself."""
    vision = config.vision_config
    return work.crops * [(vision.image_size // vision.patch_size) ** 2 + has_cls(config)]
