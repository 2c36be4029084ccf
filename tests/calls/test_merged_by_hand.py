"""Calls without images of their own: features merged by hand, the language model called directly, continuous batching."""

import warnings

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families.qwen2_5_vl import CASES as QWEN25_VL
from support.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from support.layerwise import language_model_inputs
from support.matrix import METHOD_PARAMETERS
from support.tiny_models import IMAGE_TOKEN, LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED
from vlmprune.errors import LayoutError, UnsupportedCallError, VlmpruneWarning

ROWS = [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]]
GREEDY = {"max_new_tokens": 4, "do_sample": False}
PLAIN = [deeper(LLAVA_CLIP_GQA), deeper(LLAVA_SIGLIP_TIED)]
MROPE = [deeper(case) for case in (*QWEN25_VL, QWEN3_VL, QWEN3_VL_MOE)]
TOKEN_METHODS = ["divprune", "random", "fastv", "pyramiddrop"]


def merged(model, inputs):
    """Return embeddings with the features in them, and which of them are visual."""
    return language_model_inputs(model, inputs)["inputs_embeds"], inputs["input_ids"] == IMAGE_TOKEN


def generated(model, inputs, beams):
    """Return the four tokens that follow the prompt."""
    return model.generate(**inputs, **GREEDY, num_beams=beams)[:, -4:]


@pytest.mark.parametrize("method", TOKEN_METHODS)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_visual_mask_prunes_embeddings_as_pixels_do(case, method):
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad():
        embeddings, visual = merged(model, inputs)
        given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
        # transformers 5.17 answers embeddings otherwise than pixels when it searches by beams, pruned or not.
        widths = [n for n in (1, 3) if torch.equal(generated(model, inputs, n), generated(model, given, n))]
        assert 1 in widths
        with vlmprune.pruned(model, method, keep=0.6, **METHOD_PARAMETERS[method]):
            expected, run = model(**inputs).logits, vlmprune.last_run(model)
            tokens = {beams: generated(model, inputs, beams) for beams in widths}
            with vlmprune.options(model, visual_mask=visual):
                assert torch.equal(model(**given).logits, expected)
                kept = [image.kept.tolist() for image in vlmprune.last_run(model).images]
                assert kept == [image.kept.tolist() for image in run.images]
                for beams in tokens:
                    assert torch.equal(generated(model, given, beams), tokens[beams])
                hidden = model.model.language_model(**given).last_hidden_state
                torch.testing.assert_close(model.lm_head(hidden), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("case", MROPE, ids=str)
def test_the_language_model_called_directly(case, method):
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad():
        given = language_model_inputs(model, inputs)
        given = {**{key: value for key, value in given.items() if value is not None}, "use_cache": True}
        with vlmprune.pruned(model, method, keep=0.6, **METHOD_PARAMETERS[method]):
            expected = model(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones(4, 2).long()], 1)
            later = {"input_ids": torch.full((4, 2), 7), "attention_mask": mask}
            positions = given["position_ids"][..., -1:] + torch.arange(1, 3)
            after = model(**later, position_ids=positions, past_key_values=expected.past_key_values).logits
            language_model = model.model.language_model
            with vlmprune.options(model, visual_mask=inputs["input_ids"] == IMAGE_TOKEN):
                output = language_model(**given)
            torch.testing.assert_close(model.lm_head(output.last_hidden_state), expected.logits, atol=2e-5, rtol=1e-4)
            output = language_model(**later, position_ids=positions, past_key_values=output.past_key_values)
            torch.testing.assert_close(model.lm_head(output.last_hidden_state), after, atol=2e-5, rtol=1e-4)


def test_the_language_model_called_with_positional_arguments():
    case = PLAIN[0]
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad():
        embeddings, visual = merged(model, inputs)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with vlmprune.pruned(model, "divprune", keep=0.3), vlmprune.options(model, visual_mask=visual):
            expected = model.model.language_model(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions
            ).last_hidden_state
            output = model.model.language_model(None, mask, positions, None, embeddings).last_hidden_state
            assert torch.equal(output, expected)
            with pytest.raises(UnsupportedCallError, match="return_dict"):
                model.model.language_model(inputs_embeds=embeddings, attention_mask=mask, return_dict=False)
        assert model.model.language_model(inputs_embeds=embeddings).last_hidden_state.shape == embeddings.shape


def test_numbers_tell_neighbouring_images_apart():
    case = PLAIN[0]
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", "B", 4], [2, "C", 40]])
    with torch.no_grad():
        embeddings, visual = merged(model, inputs)
        numbers = visual.int()
        numbers[0, 39:75] *= 7
        given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
        with vlmprune.pruned(model, "divprune", keep=9):
            expected = model(**inputs).logits
            with vlmprune.options(model, visual_mask=numbers):
                assert torch.equal(model(**given).logits, expected)
                assert [image.total for image in vlmprune.last_run(model).images] == [36, 36, 36]
            with vlmprune.options(model, visual_mask=visual):
                model(**given)
                assert [image.total for image in vlmprune.last_run(model).images] == [72, 36]
                assert [image.modality for image in vlmprune.last_run(model).images] == ["image", "image"]


@pytest.mark.parametrize(
    ("method", "needs"),
    [("fastervlm", "a vision tower"), ("pool", "visual tokens that form one plain grid"), ("todre", "a vision tower")],
)
def test_methods_that_need_more_than_tokens_refuse(method, needs):
    case = PLAIN[0]
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad():
        embeddings, visual = merged(model, inputs)
        unpruned = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
        with vlmprune.pruned(model, method, keep=0.5, **METHOD_PARAMETERS[method]):
            with (
                vlmprune.options(model, visual_mask=visual),
                pytest.raises(UnsupportedCallError, match=f"'{method}' needs {needs}"),
            ):
                model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
            with vlmprune.options(model, visual_mask=visual, keep=1.0):
                logits = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
                assert torch.equal(logits, unpruned)


def test_masks_that_do_not_fit():
    case = PLAIN[0]
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad():
        embeddings, visual = merged(model, inputs)
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    with torch.no_grad(), vlmprune.pruned(model, "divprune"):
        for mask, message in (
            ([[True]], "of type list"),
            (visual.float(), "float32"),
            (visual[0], "shape"),
            (-visual.int(), "holds -1"),
        ):
            with pytest.raises(LayoutError, match=message), vlmprune.options(model, visual_mask=mask):
                pass
        for mask in (visual[:, 1:], visual[:3]):
            with vlmprune.options(model, visual_mask=mask), pytest.raises(LayoutError, match="the call has 4 x"):
                model(**given)
        with vlmprune.options(model, visual_mask=visual):
            with pytest.raises(UnsupportedCallError, match="the call brings images"):
                model(**inputs)
            with pytest.raises(UnsupportedCallError, match="pass inputs_embeds"):
                model.model.language_model(input_ids=inputs["input_ids"])
        with vlmprune.options(model, visual_mask=torch.zeros_like(visual)):
            model(**given)
            assert vlmprune.last_run(model).images == []


@pytest.mark.parametrize("direct", [False, True])
def test_embeddings_without_images_are_told_of_once(direct):
    case = PLAIN[0]
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad():
        embeddings, visual = merged(model, inputs)
        given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
        called = model.model.language_model if direct else model
        with vlmprune.pruned(model, "divprune"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(**inputs)
                model.generate(**case.inputs([[5]]), **GREEDY)
                with vlmprune.options(model, visual_mask=visual):
                    called(**given)
            with pytest.warns(VlmpruneWarning, match="nothing was pruned.*visual_mask") as told:
                called(**given)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                called(**given)
            assert len(told) == 1


def test_continuous_batching_is_refused_while_a_method_is_applied():
    model = PLAIN[0].build(torch.float32)
    with vlmprune.pruned(model, "divprune"):
        with pytest.raises(
            UnsupportedCallError, match=r"`generate_batch` takes token ids .* `vlmprune.remove\(model\)`"
        ):
            model.generate_batch([[5, 6, 7]])
        with pytest.raises(UnsupportedCallError, match="init_continuous_batching"):
            model.init_continuous_batching()
    assert "generate_batch" not in vars(model)
