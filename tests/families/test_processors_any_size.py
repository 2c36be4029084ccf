"""The real processors of families from InternVL to PaddleOCR-VL on photographs of several sizes, through `generate`."""

import pytest
import torch

import vlmprune
from support.families import glm4v, idefics3, internvl, paddleocr_vl, pixtral
from support.families.by_hand import check_pruned, language_model_inputs
from support.families.real_processors import (
    glm4v_processor,
    idefics3_processor,
    internvl_processor,
    paddleocr_processor,
    photograph,
    pixtral_processor,
)
from support.layerwise import placeholders

GLM_PICTURE = "<|begin_of_image|><|image|><|end_of_image|>"
GREEDY = {"max_new_tokens": 4, "do_sample": False}
SETUPS = {
    "internvl": (internvl.INTERNVL, internvl_processor, "<IMG_CONTEXT>"),
    "idefics3": (idefics3.IDEFICS3, lambda: idefics3_processor(idefics3.IDEFICS3), "<image>"),
    "smolvlm": (idefics3.SMOLVLM, lambda: idefics3_processor(idefics3.SMOLVLM), "<image>"),
    "glm4v": (glm4v.GLM4V, lambda: glm4v_processor("Glm4v"), GLM_PICTURE),
    "glm46v": (glm4v.GLM46V, lambda: glm4v_processor("Glm46V"), GLM_PICTURE),
    "mistral3": (pixtral.MISTRAL3, lambda: pixtral_processor(2), "[IMG]"),
    "llava-pixtral": (pixtral.LLAVA_PIXTRAL, lambda: pixtral_processor(1), "[IMG]"),
    "paddleocr-vl": (
        paddleocr_vl.PADDLEOCR_VL,
        paddleocr_processor,
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
    ),
}
# One tile an image of the model, of several that the processor cuts of a photograph.
TILED = ("internvl", "idefics3", "smolvlm")


def pictures():
    """A square, a wide, a tall one."""
    coffee, astronaut = photograph("coffee"), photograph("astronaut")
    return [astronaut, coffee[:200, :600], coffee[:, :250]]


@pytest.fixture(params=SETUPS, ids=str)
def setup(request):
    case, make, mark = SETUPS[request.param]
    if request.param == "smolvlm":
        pytest.importorskip("num2words")
    return request.param, case.build(torch.float32), make(), mark


def texts(mark):
    return [f"what is shown here ? {mark}", f"{mark} and {mark} describe the picture .", "what is a clip ?"]


def prepared(processor, rows, images):
    """Inputs of rows, each with a list of its pictures."""
    nested = type(processor).__name__.startswith(("Idefics3", "SmolVLM"))
    given = images if nested else [picture for row in images for picture in row]
    return dict(processor(text=rows, images=given, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("method", ["divprune", "fastervlm"])
def test_photographs_of_several_sizes(setup, method):
    name, model, processor, mark = setup
    square, wide, tall = pictures()
    rows, images = texts(mark), [[square], [wide, tall], []]
    batch = prepared(processor, rows, images)
    given = language_model_inputs(model, batch)
    with torch.no_grad():
        plain = model(**batch).logits
        with vlmprune.pruned(model, method, keep=1.0):
            assert torch.equal(model(**batch).logits, plain)
        with vlmprune.pruned(model, method, keep=0.3):
            logits = model(**batch).logits
            run = vlmprune.last_run(model)
            new = model.generate(**batch, **GREEDY)[:, -4:]
            for row in range(2):
                alone = prepared(processor, [rows[row]], [images[row]])
                assert model.generate(**alone, **GREEDY)[0, -4:].tolist() == new[row].tolist()
                kept = [image.kept.tolist() for image in vlmprune.last_run(model).images]
                assert kept == [image.kept.tolist() for image in run.images if image.batch_index == row]
    check_pruned(model, batch, run, logits, new, given)
    totals = placeholders(model, batch["input_ids"]).sum(1).tolist()
    assert totals == [sum(image.total for image in run.images if image.batch_index == row) for row in range(3)]
    assert [len(image.kept) for image in run.images] == [max(1, round(0.3 * image.total)) for image in run.images]
    if name in TILED:
        assert {image.grid for image in run.images} == {(5, 5)}
        assert len(run.images) > 3
    else:
        grids = [image.grid for image in run.images]
        assert len(grids) == 3
        assert grids[1][0] < grids[1][1]
        assert grids[2][0] > grids[2][1]


def test_a_clip_of_glm4v():
    model, processor = glm4v.GLM4V.build(torch.float32), glm4v_processor("Glm4v")
    frames = torch.stack(
        [torch.from_numpy(photograph("chelsea")[i : i + 120, i : i + 160]).movedim(-1, 0) for i in range(6)]
    )
    text = ["what is shown here ? <|begin_of_video|><|video|><|end_of_video|> describe the clip ."]
    inputs = dict(processor(text=text, videos=[frames], return_tensors="pt", do_sample_frames=False))
    given = language_model_inputs(model, inputs)
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.3):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, **GREEDY)[:, -4:]
    [video] = run.videos
    assert len(video.layout.frame.unique()) == 3
    assert video.total == int((inputs["input_ids"] == model.config.image_token_id).sum())
    check_pruned(model, inputs, run, logits, new, given)
