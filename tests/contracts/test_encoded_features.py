"""Features that are encoded in one call and used in another: signals find their own features, or the call is refused."""

import copy
import gc
import inspect

import pytest
import torch
from transformers import GenerationMixin

import vlmprune
from support.families import llava_next, llava_onevision, qwen2_5_vl
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedCallError

FAMILIES = (LLAVA_CLIP_GQA, llava_next.CASES[0], llava_onevision.CASES[0], qwen2_5_vl.CASES[0])
over_families = pytest.mark.parametrize("family", FAMILIES, ids=repr)

pytestmark = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"), reason="older hosts encode inside the forward only"
)

ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9]]


def encode(model, inputs):
    accepted = inspect.signature(model.model.get_image_features).parameters
    return model.model.get_image_features(**{key: inputs[key] for key in accepted if key in inputs}, return_dict=True)


def prefill(model, inputs, output):
    given = {key: value for key, value in inputs.items() if not key.startswith("pixel_values")}
    return model(**given, mm_encoder_outputs={"image": output}).logits


def rebuilt(output, change=torch.clone, order=None):
    """Return what accelerate makes of an output on its way to another device: a new object with new tensors."""
    features = [change(feature) for feature in output.pooler_output]
    new = type(output)({key: value for key, value in output.items() if key != "pooler_output"})
    new.pooler_output = features if order is None else [features[image] for image in order]
    return new


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@over_families
@pytest.mark.parametrize("method", ["fastervlm", "divprune"])
def test_moved_features_keep_their_signals(family, method):
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with vlmprune.pruned(model, method, keep=0.3):
        expected = model(**inputs).logits
        output = encode(model, inputs)
        assert torch.equal(prefill(model, inputs, output), expected)
        assert torch.equal(prefill(model, inputs, rebuilt(output)), expected)
        assert torch.equal(prefill(model, inputs, copy.deepcopy(output)), expected)


@over_families
def test_two_interleaved_generations_do_not_mix(family):
    model = family.build(torch.float32)
    prompts = [family.inputs([[3, name, 4]]) for name in "ABC"]
    with vlmprune.pruned(model, "fastervlm", keep=0.3):
        expected = [model(**prompt).logits for prompt in prompts]
        outputs = [encode(model, prompt) for prompt in prompts]
        for place in (1, 0, 2):
            logits = prefill(model, prompts[place], rebuilt(outputs[place]))
            assert torch.equal(logits, expected[place])


@over_families
def test_reordered_joined_and_single_features_take_their_signals_along(family):
    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4, "B", 2]])
    swapped, single = family.inputs([[3, "B", 4, "A", 2]]), family.inputs([[3, "B", 4]])
    with vlmprune.pruned(model, "fastervlm", keep=0.3):
        kept = {}
        for name, given in (("swapped", swapped), ("single", single)):
            kept[name] = model(**given).logits, [image.kept.tolist() for image in vlmprune.last_run(model).images]
        output = encode(model, inputs)
        joined = encode(model, family.inputs([["B"]]))
        second = encode(model, family.inputs([["A"]]))
        joined.pooler_output = [*joined.pooler_output, *second.pooler_output]
        cases = {
            "swapped": [rebuilt(output, order=[1, 0]), rebuilt(output, lambda feature: feature, [1, 0]), joined],
            "single": [rebuilt(output, order=[1])],
        }
        for name, outputs in cases.items():
            for number, given in enumerate(outputs):
                logits = prefill(model, {"swapped": swapped, "single": single}[name], given)
                torch.testing.assert_close(logits, kept[name][0], atol=2e-5, rtol=1e-4, msg=f"{name} {number}")
                assert [image.kept.tolist() for image in vlmprune.last_run(model).images] == kept[name][1]


@over_families
def test_other_features_are_refused(family):
    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4]])
    before = encode(model, family.inputs([[3, "B", 4]]))
    with vlmprune.pruned(model, "fastervlm", keep=0.3):
        output = encode(model, inputs)
        for stale in (before, rebuilt(output, lambda feature: feature + 1e-3)):
            with pytest.raises(UnsupportedCallError, match="not encoded under the applied method"):
                prefill(model, inputs, stale)
        replaced = encode(model, inputs)
        replaced.pooler_output = [feature.flip(0) for feature in replaced.pooler_output]
        with pytest.raises(UnsupportedCallError, match="changed since"):
            prefill(model, inputs, replaced)
    with vlmprune.pruned(model, "fastervlm", keep=0.3), pytest.raises(UnsupportedCallError):
        prefill(model, inputs, rebuilt(output))


def test_features_cast_to_another_dtype_are_known():
    model, inputs = LLAVA_CLIP_GQA.build(torch.float32), LLAVA_CLIP_GQA.inputs(ROWS)
    with vlmprune.pruned(model, "fastervlm", keep=0.3):
        model(**inputs)
        expected = [image.kept.tolist() for image in vlmprune.last_run(model).images]
        output = encode(model, inputs)
        prefill(model, inputs, rebuilt(output, torch.Tensor.bfloat16))
        assert [image.kept.tolist() for image in vlmprune.last_run(model).images] == expected


def test_nothing_is_kept_of_an_encoding_that_nobody_holds():
    model, inputs = LLAVA_CLIP_GQA.build(torch.float32), LLAVA_CLIP_GQA.inputs(ROWS)
    with vlmprune.pruned(model, "fastervlm", keep=0.3):
        live = model.__dict__["_vlmprune"].sites.input.live
        model.generate(**inputs, max_new_tokens=2, num_beams=2)
        output = encode(model, inputs)
        gc.collect()
        assert [visuals.counts for visuals in live.of("image")] == [(36, 36, 36)]
        del output
        assert live.of("image") == []
