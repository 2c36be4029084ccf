"""What `apply` and `remove` cost on a model of 7B parameters, on the meta device: servers may do both for a request."""

import time

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import vlmprune
from support.matrix import REQUIRED


def llava():
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=32000)
    return LlavaForConditionalGeneration(config)


def qwen():
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "num_heads": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("build", [llava, qwen])
def test_apply_and_remove_take_less_than_ten_milliseconds(build):
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) > 7e9
    for method in vlmprune.list_methods(model):
        times = []
        for _ in range(5):
            # Of the processor, so that a busy machine does not fail the test; measured, it is 0.3 to 2 ms.
            start = time.process_time()
            vlmprune.remove(vlmprune.apply(model, method, **REQUIRED.get(method, {})))
            times.append(time.process_time() - start)
        assert min(times) < 0.01, f"{method}: {min(times) * 1e3:.1f} ms"
