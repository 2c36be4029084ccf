"""What users get wrong: each a clear error, nothing half-applied."""

import pytest
import torch
from transformers import LlamaForCausalLM

import vlmprune
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED
from vlmprune.errors import (
    AlreadyAppliedError,
    BudgetError,
    LayoutError,
    NoRunError,
    NotAppliedError,
    ParameterError,
    UnknownNameError,
    UnsupportedCallError,
    UnsupportedFamilyError,
    UnsupportedMethodError,
)
from vlmprune.methods import DivPrune, Random


@pytest.fixture
def model():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    yield model
    if "_vlmprune" in model.__dict__:
        vlmprune.remove(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "divprun"}, UnknownNameError, "Did you mean 'divprune'"),
        ({"method": "zzz"}, UnknownNameError, "Unknown method 'zzz'. Allowed: random"),
        ({"method": 7}, UnknownNameError, "Unknown method 7"),
        ({"method": "random", "sed": 1}, UnknownNameError, "Unknown parameter of random 'sed'. Did you mean 'seed'"),
        ({"method": "random", "seed": -1}, ParameterError, "seed=-1"),
        ({"method": "random", "keep": 0}, BudgetError, "keep=0"),
        ({"method": "random", "keep": True}, BudgetError, "keep=True"),
        ({"method": "random", "positions": "compakt"}, UnknownNameError, "Did you mean 'compact'"),
        ({"method": Random(keep=0.5), "keep": 0.25}, ParameterError, "set it on the object"),
        ({"method": []}, UnsupportedMethodError, "one per site"),
        ({"method": ["random", "divprune"]}, UnsupportedMethodError, "site"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_leave_the_model_alone(model, arguments, error, message):
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    with pytest.raises(error, match=message):
        vlmprune.apply(model, **arguments)
    assert "_vlmprune" not in model.__dict__
    assert hooks == sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_applying_twice_and_removing_too_often(model):
    assert vlmprune.apply(model, "random", 0.5) is model
    with pytest.raises(AlreadyAppliedError, match=r"already carries Random\(keep=0.5"):
        vlmprune.apply(model, "divprune")
    with pytest.raises(NoRunError, match="no prefill has run"):
        vlmprune.last_run(model)
    assert vlmprune.remove(model) is model
    with pytest.raises(NotAppliedError, match="LlavaForConditionalGeneration"):
        vlmprune.remove(model)
    with pytest.raises(NotAppliedError):
        vlmprune.last_run(model)
    with pytest.raises(NotAppliedError):
        vlmprune.remove("not a model")


def test_unknown_family_lists_the_supported_ones():
    text_model = LlamaForCausalLM(LLAVA_CLIP_GQA.build(torch.float32).config.text_config)
    with pytest.raises(UnsupportedFamilyError, match=r"LlamaForCausalLM .* Supported: LlavaForConditionalGeneration"):
        vlmprune.apply(text_model, "random")
    with pytest.raises(UnsupportedFamilyError):
        vlmprune.list_methods(text_model)


def test_method_and_class_and_object_are_the_same(model):
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4]])
    logits = []
    for method in ("divprune", DivPrune, DivPrune(keep=0.3), ["divprune"], [DivPrune(keep=0.3)]):
        given = {} if isinstance(method, DivPrune) or method == [DivPrune(keep=0.3)] else {"keep": 0.3}
        with torch.no_grad(), vlmprune.pruned(model, method, **given):
            logits.append(model(**inputs).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_list_methods_knows_what_a_model_lacks():
    assert "pool" in vlmprune.list_methods()
    assert set(vlmprune.list_methods(LLAVA_SIGLIP_TIED.build(torch.float32))) <= set(vlmprune.list_methods())


def test_placeholders_that_do_not_match_the_images(model):
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4]])
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with vlmprune.pruned(model, "random"), pytest.raises((LayoutError, ValueError), match=r"do not match|placeholders"):
        model(**inputs)


def test_image_over_the_end_of_a_row(model):
    ids = torch.full((2, 40), 5)
    tokens = LLAVA_CLIP_GQA.tokens("A")
    ids.view(-1)[10 : 10 + tokens] = 119
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4]])
    with vlmprune.pruned(model, "random"), pytest.raises(LayoutError, match="do not fit the placeholders of row 0"):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])


def test_features_from_before_apply_and_chunked_prefill_are_refused(model):
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4]])
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with vlmprune.pruned(model, "random"):
            with pytest.raises(UnsupportedCallError, match=r"before `apply`|takes none and would go on without"):
                model(**ids, mm_encoder_outputs={"image": features})
            with pytest.raises(UnsupportedCallError, match="prefill_chunk_size"):
                model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


def test_misspelt_attribute_of_the_package():
    with pytest.raises(AttributeError, match="Did you mean 'apply'"):
        vlmprune.aply  # noqa: B018
