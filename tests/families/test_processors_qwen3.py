"""Qwen3-VL and Qwen3.5 behind their processor, with photographs of different sizes and text-only neighbours."""

import pytest
import torch

import vlmprune
from support.families import qwen3_5, qwen3_vl
from support.families.by_hand import check_pruned, language_model_inputs
from support.families.real_processors import QWEN_PATCH, photograph, qwen_processor, with_patches

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = [
    f"what is shown here ? {PICTURE}",
    f"{PICTURE} and {PICTURE} describe the picture .",
    "what is a clip ?",
]
# Pixels of the model's pictures are at most 160 x 160; one visual token covers 32 x 32 of them.
GRIDS = {"coffee": (4, 6), "astronaut": (5, 5), "chelsea": (4, 6)}


@pytest.fixture(params=(*qwen3_vl.CASES, *qwen3_5.CASES), ids=str)
def model(request):
    return with_patches(request.param, QWEN_PATCH["Qwen3VLProcessor"])


@pytest.fixture(scope="module")
def inputs():
    processor = qwen_processor("Qwen3VLProcessor")
    pictures = [photograph(name) for name in GRIDS]
    return dict(processor(text=TEXTS, images=pictures, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("method", ["random", "uniform", "divprune", "fastervlm", "vtc_cls"])
def test_pruned_call_equals_the_unpatched_language_model_by_hand(model, inputs, method):
    given = language_model_inputs(model, inputs)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.25):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
    assert [image.grid for image in run.images] == list(GRIDS.values())
    assert [(image.batch_index, len(image.kept)) for image in run.images] == [(0, 6), (1, 6), (1, 6)]
    check_pruned(model, inputs, run, logits, new, given)


def test_keep_everything_is_bit_identical(model, inputs):
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for method in {"divprune", "pool", "fastervlm", "pyramiddrop"}.intersection(vlmprune.list_methods(model)):
            with vlmprune.pruned(model, method, keep=1.0):
                assert torch.equal(model(**inputs).logits, logits)
                assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


def test_diverse_tokens_lie_where_the_picture_changes(model):
    """The picture is one colour but for a corner."""
    processor = qwen_processor("Qwen3VLProcessor")
    picture = photograph("astronaut")[:160, :160].copy()
    picture[:, :] = 30
    picture[96:, 96:] = photograph("coffee")[100:164, 100:164]
    one = dict(processor(text=TEXTS[:1], images=[picture], return_tensors="pt"))
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=4):
        model(**one)
        (image,) = vlmprune.last_run(model).images
    assert image.grid == (5, 5)
    corner = (image.layout.row[image.kept] >= 3) & (image.layout.column[image.kept] >= 3)
    assert int(corner.sum()) >= 3
