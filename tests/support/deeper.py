"""Variants of the tiny models with more language-model layers, for the methods that drop tokens between layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from support.tiny_models import FamilyCase, spread_weights

LAYERS = 6


@lru_cache(maxsize=32)
def deeper(case: FamilyCase, layers: int = LAYERS) -> FamilyCase:
    """Return the same case with a language model of `layers` layers; nothing is built before it is asked for."""

    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        shallow = case.build(torch.float32)
        config = copy.deepcopy(shallow.config)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        kinds = getattr(text, "layer_types", None)
        if kinds:
            text.layer_types = [kinds[layer % len(kinds)] for layer in range(layers)]
        model = spread_weights(type(shallow)(config))
        model.load_state_dict(shallow.state_dict(), strict=False)
        model = model.to(dtype).eval()
        model.generation_config = copy.deepcopy(shallow.generation_config)
        return model

    return replace(case, name=f"{case.name}-{layers}-layers", build=build)
