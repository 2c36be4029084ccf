"""`vision_feature_layer` given for a call, and towers whose attention nobody can read."""

import inspect

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

import vlmprune
from support.families.llava_next import CASES as LLAVA_NEXT
from support.families.vip_llava import CASES as VIP_LLAVA
from support.matrix import REQUIRED
from support.tiny_models import IMAGE_TOKEN, LLAMA_GQA, LLAVA_CLIP_GQA, spread_weights
from vlmprune.errors import UnsupportedCallError, UnsupportedMethodError
from vlmprune.methods.registry import make_method

CASES = [LLAVA_CLIP_GQA, *LLAVA_NEXT, *VIP_LLAVA]


def layers(case, model):
    """Return the configured layers written otherwise, and other ones."""
    if case in VIP_LLAVA:
        configured = model.config.vision_feature_layers
        depth = model.config.vision_config.num_hidden_layers + 1
        return [layer % depth for layer in configured], [1] * len(configured)
    return 2, 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_feature_layers_than_configured(case):
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 4]])
    name = (
        "vision_feature_layers"
        if case in VIP_LLAVA and "vision_feature_layers" in forward(model)
        else "vision_feature_layer"
    )
    same, other = layers(case, model)
    with torch.no_grad():
        unpruned = model(**inputs, **{name: other}).logits
        for method in ("fastervlm", "vtc_cls"):
            with vlmprune.pruned(model, method, keep=0.3):
                assert torch.equal(model(**inputs, **{name: same}).logits, model(**inputs).logits)
                with pytest.raises(UnsupportedCallError, match=f"{name}.*was given for this call, and '{method}'"):
                    model(**inputs, **{name: other})
                with vlmprune.options(model, keep=1.0):
                    assert torch.equal(model(**inputs, **{name: other}).logits, unpruned)
        with vlmprune.pruned(model, "divprune", keep=0.3):
            assert not torch.equal(model(**inputs, **{name: other}).logits, model(**inputs).logits)


def forward(model):
    return inspect.signature(model.forward).parameters


def pixtral():
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config={**LLAMA_GQA.to_dict(), "num_hidden_layers": 4},
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return spread_weights(LlavaForConditionalGeneration(config)).eval()


def test_a_tower_over_pictures_of_any_size_is_offered_what_it_can_serve():
    model = pixtral()
    served = vlmprune.list_methods(model)
    assert {"divprune", "fastervlm"} <= set(served)
    with pytest.raises(UnsupportedMethodError, match="'hired' needs images encoded in tiles of one size"):
        vlmprune.apply(model, "hired")
    sizes = torch.tensor([[24, 16], [12, 24]])
    counts = (sizes // 4).prod(1).tolist()
    ids = [5, 6, *[IMAGE_TOKEN] * counts[0], 7, 8, *[IMAGE_TOKEN] * counts[1], 9]
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids)).long(),
        "pixel_values": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)),
        "image_sizes": sizes,
    }
    with torch.no_grad():
        whole = model(**inputs).logits
        for method in served:
            if {part.site for part in make_method(method, **REQUIRED.get(method, {})).parts()} != {
                "input"
            } and method not in (
                "fastv",
                "pyramiddrop",
            ):
                continue
            with vlmprune.pruned(model, method, keep=1.0, **REQUIRED.get(method, {})):
                assert torch.equal(model(**inputs).logits, whole)
            # Later layers see fewer tokens than the first.
            parameters = {"fastv": {"layer": 1}, **REQUIRED}.get(method, {})
            with vlmprune.pruned(model, method, keep=0.5, **parameters):
                model(**inputs)
                images = vlmprune.last_run(model).images
                assert [image.total for image in images] == counts
                assert all(0 < len(image.kept) <= image.total // 2 for image in images)
                assert [image.grid for image in images] == [(6, 4), (3, 6)]
