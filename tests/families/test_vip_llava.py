"""ViP-LLaVA: several feature layers; everything else is tested with the contracts."""

import pytest
import torch
from transformers import SiglipVisionConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

import vlmprune
from support.families.vip_llava import VIP_LLAVA
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, SIGLIP
from vlmprune.methods.batch import TowerFacts
from vlmprune.patches.families.registry import find_family


@pytest.mark.parametrize(("layers", "deepest"), [([-2, -3, 1], 1), ([-1, 0], 2), ((1, 2), 1), (-2, 1)])
def test_the_deepest_feature_layer_counts(layers, deepest):
    model = VIP_LLAVA.build(torch.float32)
    previous, model.config.vision_feature_layers = model.config.vision_feature_layers, layers
    try:
        assert find_family(model).tower_facts == TowerFacts(layers=3, feature_layer=deepest, has_cls=True, heads=4)
    finally:
        model.config.vision_feature_layers = previous


def test_methods_that_are_served():
    model = VIP_LLAVA.build(torch.float32)
    served = set(vlmprune.list_methods(model))
    assert {"random", "uniform", "pool", "fastervlm", "vtc_cls", "hired", "divprune", "todre", "fastv"} <= served
    assert "globalcom2" not in served


@pytest.mark.parametrize("method", ["fastervlm", "pool"])
def test_kept_tokens_of_two_images(method):
    model, inputs = VIP_LLAVA.build(torch.float32), VIP_LLAVA.inputs([[3, "A", 4], [2, "B", 1, "C", 6]])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=9):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        images = vlmprune.last_run(model).images
    assert [(image.total, len(image.kept), image.grid) for image in images] == [(36, 9, (6, 6))] * 3


def test_a_tower_without_cls_token_loses_a_patch_and_has_no_grid():
    vision = SiglipVisionConfig(**{**SIGLIP.to_dict(), "num_hidden_layers": 2})
    config = VipLlavaConfig(
        vision_config=vision.to_dict(),
        text_config=LLAMA_GQA.to_dict(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-1, 1],
    )
    model = VipLlavaForConditionalGeneration(config).eval()
    assert "pool" not in vlmprune.list_methods(model)
    ids = torch.tensor([[5] + [IMAGE_TOKEN] * 24 + [6, 7]])
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=8):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 20, 20))
        [image] = vlmprune.last_run(model).images
    assert (image.total, len(image.kept), image.grid) == (24, 8, None)
