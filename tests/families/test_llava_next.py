"""LLaVA-NeXT: what its calls may look like, and calls that cannot be served."""

import inspect

import pytest
import torch

import vlmprune
from support.families.llava_next import CUTS, LLAVA_NEXT
from vlmprune.errors import LayoutError, UnsupportedCallError, UnsupportedMethodError

ROWS = [[3, "A", 4], [2, "small", 1, "large", 3], [9]]


def run_of(model, inputs, method="hired", **parameters):
    """Return logits and record of a pruned prefill."""
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **parameters):
        logits = model(**inputs).logits
        return logits, vlmprune.last_run(model)


def test_methods_that_are_served():
    model = LLAVA_NEXT.build(torch.float32)
    served = vlmprune.list_methods(model)
    assert {"random", "uniform", "fastervlm", "vtc_cls", "hired", "globalcom2", "divprune", "todre"} <= set(served)
    assert "pool" not in served
    with pytest.raises(UnsupportedMethodError, match="one plain grid"):
        vlmprune.apply(model, "pool")


def test_record_of_several_sizes_and_a_row_without_image():
    _, run = run_of(LLAVA_NEXT.build(torch.float32), LLAVA_NEXT.inputs(ROWS))
    totals = [CUTS[name][1] for name in ("default", "small", "large")]
    assert [(image.batch_index, image.total) for image in run.images] == list(zip([0, 1, 1], totals, strict=True))
    assert [len(image.kept) for image in run.images] == [round(0.3 * total) for total in totals]
    assert all(image.grid is None for image in run.images)
    assert run.text_tokens == [7, 6, 9]
    assert [layers[0] for layers in run.visual_tokens_per_layer] == [17, 20 + round(0.3 * totals[2]), 0]


def test_tiles_given_one_after_the_other():
    """Pixels may come without the tile dimension."""
    model, inputs = LLAVA_NEXT.build(torch.float32), LLAVA_NEXT.inputs(ROWS)
    logits, run = run_of(model, inputs)
    tiles = [1 + CUTS[name][0] for name in ("default", "small", "large")]
    pixels = [image[:count] for image, count in zip(inputs["pixel_values"], tiles, strict=True)]
    again, other_run = run_of(model, {**inputs, "pixel_values": torch.cat(pixels)})
    assert torch.equal(again, logits)
    assert [image.kept.tolist() for image in other_run.images] == [image.kept.tolist() for image in run.images]


def test_padded_tiles_are_not_looked_at():
    model, inputs = LLAVA_NEXT.build(torch.float32), LLAVA_NEXT.inputs([[3, "A", 4]])
    logits, _ = run_of(model, inputs)
    inputs["pixel_values"][:, 3:] = 1e6
    assert torch.equal(run_of(model, inputs)[0], logits)


@pytest.mark.parametrize("method", ["hired", "divprune"])
def test_placeholders_of_another_processor(method):
    model, inputs = LLAVA_NEXT.build(torch.float32), LLAVA_NEXT.inputs([[3, "A", 4]])
    fewer = {**inputs, "input_ids": inputs["input_ids"][:, 5:], "attention_mask": inputs["attention_mask"][:, 5:]}
    with pytest.raises(ValueError, match="do not match"):
        run_of(model, fewer, method)
    assert len(run_of(model, inputs, method)[1].images) == 1, "the failed call left something behind"


@pytest.mark.parametrize("method", ["hired", "divprune"])
@pytest.mark.parametrize("names", [("small", "large"), ("large", "small")])
def test_images_in_the_wrong_order(method, names):
    model = LLAVA_NEXT.build(torch.float32)
    inputs = LLAVA_NEXT.inputs([[3, names[0], 4], [3, names[1], 4]])
    swapped = LLAVA_NEXT.inputs([[3, names[1], 4], [3, names[0], 4]])
    inputs |= {key: swapped[key] for key in ("pixel_values", "image_sizes")}
    with pytest.raises(LayoutError, match="placeholders of row 0"):
        run_of(model, inputs, method)


def test_an_image_too_few_or_sizes_missing():
    model, inputs = LLAVA_NEXT.build(torch.float32), LLAVA_NEXT.inputs([[3, "A", 4], [3, "B", 4]])
    for key in ("pixel_values", "image_sizes"):
        with pytest.raises((ValueError, RuntimeError), match=r"match|split"):
            run_of(model, {**inputs, key: inputs[key][:1]})
    without = {key: value for key, value in inputs.items() if key != "image_sizes"}
    with pytest.raises(TypeError):
        run_of(model, without)


def test_features_encoded_before_the_method_was_applied():
    model, inputs = LLAVA_NEXT.build(torch.float32), LLAVA_NEXT.inputs([[3, "A", 4]])
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers encodes images inside the forward")
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        encoded = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        with vlmprune.pruned(model, "hired", keep=0.3), pytest.raises(UnsupportedCallError, match="before `apply`"):
            model(**text, mm_encoder_outputs={"image": encoded})


def test_a_setting_that_keeps_the_cls_token_is_the_hosts_error():
    model, inputs = LLAVA_NEXT.build(torch.float32), LLAVA_NEXT.inputs([[3, "A", 4]])
    with pytest.raises((RuntimeError, ValueError)):
        run_of(model, {**inputs, "vision_feature_select_strategy": "full"})
    assert len(run_of(model, inputs)[1].images) == 1
