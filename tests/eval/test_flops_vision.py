"""Costs of every family's tower and of whole requests against torch's own counter, on tiny models and on true ones."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import vlmprune
from support.tiny_configs import MAKERS, TOWER, tiny_config
from vlmprune.errors import UnknownNameError
from vlmprune.eval.flops import VisionWork, request_cost, vision_cost
from vlmprune.eval.models.random_weights import preset_config
from vlmprune.eval.models.synthetic_request import synthetic_request


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def eager(model_type):
    config = tiny_config(model_type)
    # Grouped products of experts are not counted by torch.
    config._experts_implementation = "eager"
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def image_features(model, inputs):
    names = inspect.signature(type(model.model).get_image_features).parameters
    return model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs})


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (33, 130)], ids=str)
@pytest.mark.parametrize("model_type", MAKERS)
def test_towers_and_requests_match_the_counter(model_type, size):
    model = eager(model_type)
    config, text = model.config, 9
    inputs = synthetic_request(config, size, text, batch_size=2)
    work, same = vision_cost(config).work(config, inputs, [1, 1])
    assert work == same
    assert counted(lambda: image_features(model, inputs)) == 2 * 2 * sum(vision_cost(config).macs(config, work))
    visual = int((inputs["input_ids"][0] == config.image_token_id).sum())
    cost = request_cost(config, work, [visual] * 3, text)
    assert counted(lambda: model(**inputs, logits_to_keep=1)) == 2 * 2 * cost.total


@pytest.mark.parametrize(
    ("vision", "feature_layer", "strategy"),
    [
        (CLIPVisionConfig(**TOWER), -2, "default"),
        (CLIPVisionConfig(**TOWER), [-2, -1], "full"),
        (SiglipVisionConfig(**TOWER), -1, "full"),
        (SiglipVisionConfig(**TOWER, vision_use_head=False), -1, "full"),
    ],
    ids=["clip", "clip-two-layers", "siglip", "siglip-without-head"],
)
def test_variants_of_llava_match_the_counter(vision, feature_layer, strategy):
    text = LlamaConfig(num_hidden_layers=1, hidden_size=24, intermediate_size=8, num_attention_heads=2, vocab_size=9)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    macs = vision_cost(config).macs
    total = counted(lambda: model.model.get_image_features(torch.zeros(3, 3, 32, 32)))
    assert 2 * sum(macs(config, VisionWork(crops=3))) == total
    assert macs(config, VisionWork()) == (0, 0)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("grid", [(8, 12), (2, 6), (10, 4)], ids=str)
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_packed_towers_match_the_counter_on_videos_and_cut_windows(model_type, grid, frames):
    model = eager(model_type)
    shape = (frames, *grid)
    pixels = torch.zeros(frames * grid[0] * grid[1], 3 * 2 * 4 * 4)
    total = counted(lambda: model.model.visual(pixels, grid_thw=torch.tensor([shape])))
    assert total == 2 * sum(vision_cost(model.config).macs(model.config, VisionWork(grids=(shape,))))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_dropped_before_the_tower_are_not_counted(model_type):
    model, shapes = eager(model_type), [(1, 8, 12), (1, 4, 4)]
    pixels = torch.randn(112, 3 * 2 * 4 * 4)
    with vlmprune.pruned(model, "pixelprune", keep=9 / 24):
        total = counted(lambda: model.model.get_image_features(pixels, torch.tensor(shapes)))
    method, kept = vlmprune.methods.PixelPrune(keep=9 / 24), [(24, 9), (4, 2)]
    cost = request_cost(model.config, VisionWork(grids=tuple(shapes)), [11] * 3, 1, method=method, images=kept)
    # Windows do not all lose the same share.
    assert 2 * (cost.vision + cost.projector) == pytest.approx(total, rel=0.02 if model_type == "qwen2_5_vl" else 0)
    assert total < counted(lambda: model.model.get_image_features(pixels, torch.tensor(shapes))) / 2


@pytest.mark.parametrize("name", ["llava-next-7b", "llava-onevision-0.5b"])
def test_true_dense_towers_match_the_counter_on_meta(name):
    config = preset_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
        pixels = torch.zeros(5, 3, *2 * [config.vision_config.image_size], dtype=torch.bfloat16)
    tower = counted(lambda: model.model.vision_tower(pixels))
    assert tower == 2 * vision_cost(config).macs(config, VisionWork(crops=5))[0]


def test_images_of_one_prompt_are_tiled_as_the_host_does():
    sizes = torch.tensor([[64, 64], [64, 64], [64, 64]])
    inputs = {"image_sizes": sizes}
    for model_type, crops in (("llava_next", [5, 10]), ("llava_onevision", [5, 2]), ("llava", [1, 2])):
        config = tiny_config(model_type)
        assert [work.crops for work in vision_cost(config).work(config, inputs, [1, 2])] == crops
    config = tiny_config("qwen2_vl")
    inputs = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2], [1, 6, 2]])}
    works = vision_cost(config).work(config, inputs, [1, 0, 2])
    assert [work.grids for work in works] == [((1, 4, 4),), (), ((1, 2, 2), (1, 6, 2))]


def test_text_alone_costs_no_tower():
    for model_type in MAKERS:
        config = tiny_config(model_type)
        (work,) = vision_cost(config).work(config, {}, [0])
        assert vision_cost(config).macs(config, work) == (0, 0)


def test_unknown_families_are_refused():
    with pytest.raises(UnknownNameError, match="llama"):
        request_cost(LlamaConfig(), VisionWork(), [1] * 32, 1)
