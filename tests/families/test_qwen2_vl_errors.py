"""What does not fit together is refused with a message that says so, and the model goes on working."""

import pytest
import torch

import vlmprune
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen2_vl import QWEN2_VL
from support.tiny_models import IMAGE_TOKEN
from vlmprune.errors import LayoutError, UnsupportedCallError, UnsupportedMethodError

over_cases = pytest.mark.parametrize("case", [QWEN2_VL, QWEN2_5_VL], ids=repr)
over_calls = pytest.mark.parametrize("call", ["forward", "generate"])


def run(model, call, inputs):
    with torch.no_grad():
        return model(**inputs).logits if call == "forward" else model.generate(**inputs, max_new_tokens=2)


@pytest.fixture(name="refused")
def _refused():
    """Runs a call under a pruned model, expects an error, and checks that a sound call then works as before."""

    def check(case, call, inputs, error, match, method="fastervlm"):
        model = case.build(torch.float32)
        sound = case.inputs([[3, "A", 4]])
        with vlmprune.pruned(model, method, keep=0.3):
            before = run(model, call, sound)
            with pytest.raises(error, match=match):
                run(model, call, inputs)
            calls = model.__dict__["_vlmprune"].calls
            assert (calls.model, calls.tower) == ([], [])
            assert torch.equal(run(model, call, sound), before)

    return check


@over_cases
@over_calls
def test_images_without_a_grid(case, call, refused):
    inputs = case.inputs([[3, "A", 4]])
    inputs["mm_token_type_ids"] = torch.zeros_like(inputs["mm_token_type_ids"])
    del inputs["image_grid_thw"]
    refused(case, call, inputs, LayoutError, r"pixel_values came with image_grid_thw=None; needed")


@over_cases
@over_calls
def test_a_grid_of_other_pixels(case, call, refused):
    inputs = case.inputs([[3, "A", 4]])
    inputs["pixel_values"] = inputs["pixel_values"][:-4]
    refused(case, call, inputs, LayoutError, r"holds 140 patches, image_grid_thw \[\[1, 12, 12\]\] stands for 144")


@over_cases
@pytest.mark.parametrize("grid", [(1, 1, 12), (1, 12, 1), (1, 0, 4), (1, 9, 4)])
def test_a_grid_without_whole_tokens(case, grid, refused):
    inputs = case.inputs([[3, "A", 4]])
    inputs["image_grid_thw"] = torch.tensor([grid])
    refused(
        case,
        "forward",
        inputs,
        LayoutError,
        f"Image 0 has 1 x {grid[1]} x {grid[2]} patches in image_grid_thw; allowed",
    )


@over_cases
def test_a_video_without_a_grid(case, refused):
    inputs = case.inputs([[3, "video A", 4]])
    del inputs["video_grid_thw"]
    inputs["mm_token_type_ids"] = torch.zeros_like(inputs["mm_token_type_ids"])
    refused(case, "forward", inputs, LayoutError, "video_grid_thw=None", method="divprune")


@over_cases
def test_fewer_placeholders_than_features(case, refused):
    """The host counts before the engine does."""
    inputs = case.inputs([[3, "A", 4]])
    inputs["position_ids"] = case.positions(case.build(torch.float32), inputs)
    first = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero()[0]
    inputs["input_ids"][0, first] = 5
    refused(
        case, "forward", inputs, Exception, "Image features and image tokens do not match, tokens: 35, features: 36"
    )


@over_cases
def test_placeholders_in_the_wrong_row(case, refused):
    """The host counts over the whole batch only, and would fill one row with another row's image."""
    inputs = case.inputs([[9, "A", 4], [9, "B", 4]])
    inputs["position_ids"] = case.positions(case.build(torch.float32), inputs)
    ids = inputs["input_ids"]
    ids[0, (ids[0] == IMAGE_TOKEN).nonzero()[0]] = 5
    ids[1, 0] = IMAGE_TOKEN
    refused(case, "forward", inputs, LayoutError, "do not fit the placeholders of row 0")


@over_cases
def test_methods_for_tiles(case):
    model = case.build(torch.float32)
    assert "hired" not in vlmprune.list_methods(model)
    with pytest.raises(UnsupportedMethodError, match="hired"):
        vlmprune.apply(model, "hired", keep=0.3)


@over_cases
@over_calls
@pytest.mark.parametrize("method", ["zooprune", "tokencorr"])
def test_methods_that_know_no_videos(case, call, method, refused):
    inputs = case.inputs([[3, "video A", 4]])
    refused(case, call, inputs, UnsupportedMethodError, "does not serve videos", method)


@over_cases
def test_features_from_before_apply(case):
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 4]])
    if "mm_encoder_outputs" not in type(model).forward.__annotations__:
        pytest.skip("this transformers encodes in the forward pass only")
    with torch.no_grad():
        pixels = inputs.pop("pixel_values")
        encoded = model.model.get_image_features(pixels, inputs["image_grid_thw"], return_dict=True)
        with vlmprune.pruned(model, "divprune", keep=0.3), pytest.raises(UnsupportedCallError, match="before `apply`"):
            model(**inputs, mm_encoder_outputs={"image": encoded})


@over_cases
def test_a_row_without_an_image_is_no_error(case):
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 4], [6]])
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.3):
        logits = model(**inputs).logits[1]
        alone = model(**case.inputs([[6]])).logits[0]
    torch.testing.assert_close(logits[inputs["attention_mask"][1].bool()], alone, atol=2e-5, rtol=1e-4)
