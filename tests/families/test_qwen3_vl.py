"""Facts of the Qwen3-VL adapter."""

import pytest
import torch
from torch import nn

import vlmprune
from support.families.qwen3_vl import CASES, QWEN3_VL
from support.families.qwen_case import VIDEO_TOKEN
from vlmprune.errors import LayoutError, UnsupportedFamilyError, UnsupportedMethodError
from vlmprune.patches.families.registry import find_family


@pytest.mark.parametrize("case", CASES, ids=str)
def test_facts(case):
    model = case.build(torch.float32)
    family = find_family(model)
    assert (family.name, family.mrope, family.has_grid, family.has_tiles) == ("Qwen3-VL", True, True, False)
    assert family.modalities == ("image", "video")
    assert (family.tower_facts.layers, family.tower_facts.feature_layer, family.tower_facts.has_cls) == (4, 3, False)
    served = vlmprune.list_methods(model)
    assert {"random", "uniform", "pool", "fastervlm", "vtc_cls", "divprune", "todre", "fastv", "pyramiddrop"} <= set(
        served
    )


def test_unsupported_models_are_told_the_supported_ones():
    class Qwen3VLForConditionalGenerations(nn.Module):
        config = None

    with pytest.raises(
        UnsupportedFamilyError, match=r"Qwen3VLForConditionalGenerations is of no supported family.*Moe"
    ):
        vlmprune.apply(Qwen3VLForConditionalGenerations(), "divprune")


def test_methods_that_need_tiles_are_refused():
    with pytest.raises(UnsupportedMethodError, match=r"globalcom2.*Qwen3-VL"):
        vlmprune.apply(QWEN3_VL.build(torch.float32), "globalcom2")


@pytest.mark.parametrize("padding", ["left", "right"])
def test_times_of_frames_that_lose_all_tokens_stay(padding):
    model, inputs = (
        QWEN3_VL.build(torch.float32),
        QWEN3_VL.inputs([[3, "video large", 4], [2, "video small", 1]], padding),
    )
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=2):
        hidden = model.model(**inputs).last_hidden_state
        run = vlmprune.last_run(model)
    assert [[len(frame) for frame in video.kept_by_frame] for video in run.videos] == [[0, 1, 0, 1], [1, 1]]
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != VIDEO_TOKEN)
    assert run.text_tokens == text.sum(1).tolist() == [3 + 4 * 4 + 4, 2 + 2 * 4 + 1]
    assert (hidden[text].abs().sum(-1) > 0).all()
    assert int((hidden[inputs["input_ids"] == VIDEO_TOKEN].abs().sum(-1) > 0).sum()) == 4


def test_images_that_do_not_fit_their_rows_are_refused():
    model, inputs = QWEN3_VL.build(torch.float32), QWEN3_VL.inputs([[2, "A", 2], [2, "small", 2]])
    positions = QWEN3_VL.positions(model, inputs)
    swapped = {**inputs, "image_grid_thw": inputs["image_grid_thw"].flip(0), "position_ids": positions}
    with (
        torch.no_grad(),
        vlmprune.pruned(model, "uniform", keep=0.3),
        pytest.raises(LayoutError, match="features of image 1 do not fit the placeholders of row 0"),
    ):
        model(**swapped)
