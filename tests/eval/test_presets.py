"""Shipped architectures: published parameter counts, and how many visual tokens a picture gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmprune.errors import UnknownNameError
from vlmprune.eval.flops import LanguageShape
from vlmprune.eval.models.random_weights import preset_config, preset_image_processor, preset_names, preset_parameters
from vlmprune.eval.models.synthetic_request import synthetic_request

PUBLISHED = {
    "llava-1.5-7b": 7.06e9,
    "llava-1.5-13b": 13.35e9,
    "llava-next-7b": 7.06e9,
    "llava-onevision-0.5b": 0.894e9,
    "llava-onevision-7b": 8.03e9,
    "qwen2-vl-2b": 2.21e9,
    "qwen2-vl-7b": 8.29e9,
    "qwen2.5-vl-3b": 3.75e9,
    "qwen2.5-vl-7b": 8.29e9,
    "qwen3-vl-4b": 4.44e9,
    "qwen3-vl-8b": 8.77e9,
}
"""Parameters as the model hub counts them; tied weights once."""
OURS = {
    "llava-160m": 0.157e9,
    "llava-small": 1.317e6,
    "llava-1b": 1.41e9,
    "llava-next-1b": 1.41e9,
    "llava-onevision-1b": 1.69e9,
    "qwen2.5-vl-1b": 1.95e9,
}
"""Nobody trained these: one for tests, and a language model of 1 B parameters in its layers behind the family's true tower."""

TOKENS = {
    ("llava-1.5-7b", (672, 672)): 576,
    ("llava-next-7b", (672, 672)): 2880 + 48,
    ("llava-next-7b", (336, 336)): 576 + 24 * 25,
    ("llava-onevision-7b", (384, 384)): 729 + 729 + 27,
    ("llava-onevision-0.5b", (768, 768)): 729 + 54 * 55,
    ("qwen2-vl-7b", (336, 336)): 144,
    ("qwen2.5-vl-7b", (1000, 700)): 36 * 25,
    ("qwen3-vl-4b", (640, 480)): 20 * 15,
    ("qwen3-vl-8b", (32, 32)): 64,
}


def test_all_families_have_presets():
    assert set(preset_names()) == {*OURS, *PUBLISHED}
    with pytest.raises(UnknownNameError, match=r"Did you mean 'llava-1\.5-7b'"):
        preset_config("llava-1.5-8b")


@pytest.mark.parametrize("name", preset_names())
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(preset_config(name), dtype=torch.bfloat16)
    model.tie_weights()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == preset_parameters(name)
    assert parameters == pytest.approx({**PUBLISHED, **OURS}[name], rel=0.01)


@pytest.mark.parametrize(("name", "size"), TOKENS, ids=str)
def test_visual_tokens_of_a_picture(name, size):
    config = preset_config(name)
    inputs = synthetic_request(config, size, 20, image_processor=preset_image_processor(name))
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == TOKENS[name, size]
    assert inputs["input_ids"].shape[1] == TOKENS[name, size] + 20


def test_rotary_bases_are_read():
    text = preset_config("qwen3-vl-8b").get_text_config()
    assert text.rope_parameters["rope_theta"] == 5000000
    assert text.rope_parameters["mrope_section"] == [24, 20, 20]
    shape = LanguageShape.from_config(preset_config("llava-1.5-7b"))
    assert (shape.layers, shape.hidden, shape.ffn) == (32, 4096, 11008)
