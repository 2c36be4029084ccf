"""Variants of the tiny models with more vision tower blocks, for the methods that reduce tokens in them."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from support.tiny_models import FamilyCase, seeded_pixels, spread_weights

BLOCKS = 5


@lru_cache(maxsize=32)
def deeper_tower(case: FamilyCase, blocks: int = BLOCKS) -> FamilyCase:
    """Return the same case with a tower of `blocks` blocks; nothing is built before it is asked for."""

    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        shallow = case.build(torch.float32)
        config = copy.deepcopy(shallow.config)
        vision = config.vision_config
        setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", blocks)
        model = spread_weights(type(shallow)(config)).to(dtype).eval()
        model.generation_config = copy.deepcopy(shallow.generation_config)
        return model

    return replace(case, name=f"{case.name}-{blocks}-blocks", build=build)


@lru_cache(maxsize=32)
def one_tile(case: FamilyCase, side: int) -> FamilyCase:
    """Return the same case with tiles of `side` x `side` patches, of a family with one tile an image."""

    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        other = case.build(torch.float32)
        config = copy.deepcopy(other.config)
        config.vision_config.image_size = side * config.vision_config.patch_size
        config.image_seq_length = side * side
        model = spread_weights(type(other)(config)).to(dtype).eval()
        model.generation_config = copy.deepcopy(other.generation_config)
        return model

    def image(name: str) -> dict[str, torch.Tensor]:
        vision = build(torch.float32).config.vision_config
        return {"pixel_values": seeded_pixels(name, vision.num_channels, vision.image_size, vision.image_size)}

    return replace(case, name=case.name, build=build, image=image, tokens=lambda name: side * side)
