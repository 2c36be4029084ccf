"""Cost of CLIP and SigLIP towers, which take pictures of one size, and of LLaVA's projectors."""

from __future__ import annotations

from math import isqrt

from transformers import PreTrainedConfig

from vlmprune.methods.encoder_method import EncoderMethod, block_tokens
from vlmprune.patches.families.facts import dense_tower_facts, drops_cls, has_cls, state_layers

from .vision_work import VisionWork


def dense_tower_macs(
    config: PreTrainedConfig, work: VisionWork, method: EncoderMethod | None = None
) -> tuple[int, int]:
    """MACs of a CLIP or SigLIP tower and of a two-layer projector for `work.crops` pictures.

    The whole tower runs, layers after the one that gives the features included, as in transformers.

    Args:
        config: the model's configuration.
        work: what the tower is given.
        method: what reduces tokens in its blocks, if anything.
    """
    vision = config.vision_config
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    patches = dense_patches(config) if work.side is None else work.side**2
    tokens = patches + has_cls(config)
    tower = patches * hidden * vision.num_channels * vision.patch_size**2
    for attended, wide in tower_tokens(config, patches, method):
        tower += attended * 4 * hidden * hidden + 2 * attended**2 * hidden + wide * 2 * hidden * ffn
    if vision.model_type.startswith("siglip") and getattr(vision, "vision_use_head", True):
        tower += 2 * hidden * hidden + 2 * tokens * hidden * hidden + 2 * tokens * hidden + 2 * hidden * ffn
    projected = tokens - (has_cls(config) and drops_cls(config))
    if method is not None and method.output == "merged":
        projected = method.plan(patches, dense_tower_facts(config))[-1]
    whole = work.crops - work.pooled
    projector = whole * projected * dense_projector_macs(config)
    return work.crops * tower, projector + (work.pooled * _pooled_frame_macs(config, patches) if work.pooled else 0)


def _pooled_frame_macs(config: PreTrainedConfig, patches: int) -> int:
    """MACs of pooling one frame of LLaVA-NeXT-Video and projecting what is left."""
    stride, hidden = int(config.spatial_pool_stride), int(config.vision_config.hidden_size)
    left = (isqrt(patches) // stride) ** 2
    pooling = stride**2 * hidden**2 if config.spatial_pool_mode == "conv" else 0
    return left * (pooling + dense_projector_macs(config))


def dense_patches(config: PreTrainedConfig) -> int:
    """Patches of a picture."""
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


def tower_tokens(config: PreTrainedConfig, patches: int, method: EncoderMethod | None) -> tuple[tuple[int, int], ...]:
    """Tokens of a picture that go through attention and through the MLP of each block, CLS token included."""
    depth, cls = int(config.vision_config.num_hidden_layers), int(has_cls(config))
    if method is None:
        return ((patches + cls, patches + cls),) * depth
    counts = block_tokens(method, patches, dense_tower_facts(config))
    return tuple((attended + cls, wide + cls) for attended, wide in counts)


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


def dense_tiles(config: PreTrainedConfig, work: VisionWork) -> list[tuple[int, tuple[int, int]]]:
    """All pictures, and rows and columns of patches of each."""
    side = int(config.vision_config.image_size // config.vision_config.patch_size)
    return [(work.crops, (side, side))]


def dense_unit(config: PreTrainedConfig) -> int:
    """Patches of a token: itself."""
    return 1
