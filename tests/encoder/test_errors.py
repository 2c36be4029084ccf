"""What an encoder method refuses: by name, with what is allowed, and with nothing half applied."""

import pytest
import torch

import vlmprune
from support.deeper_tower import deeper_tower
from support.families import llava_next, qwen2_vl
from support.tiny_models import IMAGE_TOKEN, LLAVA_CLIP_GQA
from vlmprune.errors import BudgetError, ParameterError, UnsupportedCallError, UnsupportedMethodError
from vlmprune.methods import ToMe

FAMILY = deeper_tower(LLAVA_CLIP_GQA)


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ({"keep": 0.1, "output": "full"}, BudgetError, "nearest: keep=0.2431"),
        ({"keep": 1, "output": "full"}, BudgetError, "nearest: keep=9"),
        ({"keep": 2, "output": "merged"}, BudgetError, "at least 3 leave the tower; nearest: keep=3"),
        ({"keep": 0.0}, BudgetError, "keeps no visual token"),
        ({"r": (4, 4, 4, 4, 4)}, ParameterError, "names 5 blocks; allowed: at most 4"),
        ({"r": -1}, ParameterError, "r=-1; allowed: an int >= 0"),
        ({"r": (4, 1.5)}, ParameterError, "r holds 1.5"),
        ({"r": 4, "keep": 0.5}, ParameterError, "both set the budget"),
        ({"inflection": 0.5}, ParameterError, "give r and no keep"),
        ({"r": 4, "inflection": 2}, ParameterError, r"inflection=2; allowed: a number in \[-1, 1\]"),
        ({"output": "ful"}, ValueError, "Did you mean 'full'"),
        ({"order": "raster"}, ValueError, "Unknown order 'raster'"),
        ({"prop_attn": False}, ValueError, "is proportional_attention=prop_attn"),
    ],
    ids=str,
)
def test_parameters(parameters, error, words):
    model = FAMILY.build(torch.float32)
    with pytest.raises(error, match=words):
        vlmprune.apply(model, "tome", **parameters)
    assert not hasattr(model, "_vlmprune")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_grid_is_not_merged_away():
    model = deeper_tower(llava_next.CASES[0]).build(torch.float32)
    with pytest.raises(UnsupportedMethodError, match=r"output='merged' one tile an image .* LLaVA-NeXT"):
        vlmprune.apply(model, ToMe(output="merged"))
    vlmprune.remove(vlmprune.apply(model, ToMe()))


def test_a_budget_that_a_call_cannot_reach():
    model = FAMILY.build(torch.float32)
    with vlmprune.pruned(model, "tome", keep=0.5):
        with pytest.raises(BudgetError, match="nearest"), vlmprune.options(model, keep=0.1):
            pass
        with pytest.raises(ParameterError, match="with one budget"), vlmprune.options(model, keep=[0.5, 0.6]):
            pass
        with vlmprune.options(model, keep=[0.6, 0.6]):
            model(**FAMILY.inputs([[3, "A", 4], [2, "B", 1]]))


def test_tokens_merged_by_hand_did_not_pass_the_tower():
    model = FAMILY.build(torch.float32)
    inputs = FAMILY.inputs([[3, "A", 4]])
    embeddings = model.get_input_embeddings()(inputs["input_ids"].clamp(max=IMAGE_TOKEN - 1))
    mask = inputs["input_ids"] == IMAGE_TOKEN
    with torch.no_grad(), vlmprune.pruned(model, "tome", keep=0.5), vlmprune.options(model, visual_mask=mask):
        with pytest.raises(UnsupportedCallError, match="given as embeddings"):
            model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
        with vlmprune.options(model, keep=1.0):
            model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])


def test_features_of_other_blocks_than_configured():
    model = FAMILY.build(torch.float32)
    refused = pytest.raises(UnsupportedCallError, match="vision_feature_layer=-1 was given")
    with torch.no_grad(), vlmprune.pruned(model, "tome", keep=0.5), refused:
        model(**FAMILY.inputs([[3, "A", 4]]), vision_feature_layer=-1)


def test_gradient_checkpointing_in_the_tower():
    model = FAMILY.build(torch.float32)
    inputs = FAMILY.inputs([[3, "A", 4]])
    layers = model.model.vision_tower.encoder.layers
    try:
        for layer in layers:
            layer.gradient_checkpointing = True
            # What older versions of transformers run the layer through.
            layer._gradient_checkpointing_func = lambda run, *args: run(*args)
            layer.train()
        with vlmprune.pruned(model, "tome", keep=0.5), pytest.raises(UnsupportedCallError, match="checkpointing"):
            model(**inputs)
    finally:
        for layer in layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func
            layer.eval()


def test_an_attention_backend_without_a_bias():
    model = FAMILY.build(torch.float32)
    config = model.model.vision_tower.config
    before = config._attn_implementation
    try:
        config._attn_implementation = "flash_attention_2"
        with pytest.raises(UnsupportedMethodError, match="'flash_attention_2' does not take; allowed: 'eager', 'sdpa'"):
            vlmprune.apply(model, ToMe(keep=0.5))
        vlmprune.remove(vlmprune.apply(model, ToMe(keep=0.5, proportional_attention=False)))
    finally:
        config._attn_implementation = before


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_backends_agree(backend):
    model, inputs = FAMILY.build(torch.float32), FAMILY.inputs([[3, "A", 4], [2, "B", 6]])
    config = model.model.vision_tower.config
    before = config._attn_implementation
    with torch.no_grad(), vlmprune.pruned(model, "tome", keep=0.5):
        expected = model(**inputs).logits
        try:
            config._attn_implementation = backend
            torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
        finally:
            config._attn_implementation = before


def test_a_packed_tower_is_refused():
    model = qwen2_vl.CASES[0].build(torch.float32)
    if "tome" not in vlmprune.list_methods(model):
        with pytest.raises(UnsupportedMethodError, match="needs a vision tower over equally large tiles"):
            vlmprune.apply(model, "tome")
