"""Gemma 3 and 4 behind their own processors, with photographs of different sizes, crops, videos and text-only neighbours."""

import pytest
import torch

import vlmprune
from support.families.gemma3 import GEMMA3, PATCH, SIDE, TOKENS
from support.families.gemma4 import CASES, GEMMA4
from support.families.real_processors import clip, gemma3_processor, gemma4_processor, photograph
from support.layerwise import check_greedy, default_positions, row_by_layers
from support.plain_methods.received_by_places import received_by_cells

PHOTOGRAPHS = ("coffee", "astronaut", "chelsea")
MODELS = {"gemma3": (GEMMA3, gemma3_processor, "<start_of_image>")} | {
    case.name: (case, gemma4_processor, "<|image|>") for case in CASES
}


def texts(picture):
    return [f"what is shown here ? {picture}", f"{picture} and {picture} describe the picture .", "what is a clip ?"]


def prepared(name):
    case, processor, picture = MODELS[name]
    pictures = [[photograph(PHOTOGRAPHS[0])], [photograph(each) for each in PHOTOGRAPHS[1:]], []]
    inputs = processor()(text=texts(picture), images=pictures, padding=True, return_tensors="pt")
    return case.build(torch.float32), dict(inputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["divprune", "fastervlm"])
def test_pruned_call_equals_the_unpatched_language_model_by_hand(name, method):
    model, inputs = prepared(name)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.25):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    assert [image.batch_index for image in run.images] == [0, 1, 1]
    assert all(len(image.kept) < image.total for image in run.images)
    # Gemma 3 makes squares of all pictures; Gemma 4 keeps their shape.
    assert (len({image.grid for image in run.images}) > 1) == (name != "gemma3")
    positions = default_positions(model, method)
    for row in range(3):
        by_hand = row_by_layers(model, inputs, run, row, positions)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=5e-5, rtol=1e-4)
        check_greedy(model, inputs, run, row, positions, new[row])


def test_crops_are_images_of_their_own():
    picture = photograph("coffee")[:150]
    inputs = gemma3_processor()(
        text="<start_of_image> describe the picture .",
        images=[picture],
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
        return_tensors="pt",
    )
    inputs = {key: value for key, value in inputs.items() if key != "num_crops"}
    model = GEMMA3.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.25):
        model(**inputs)
        images = vlmprune.last_run(model).images
    assert len(images) == len(inputs["pixel_values"]) > 2
    assert [image.total for image in images] == [TOKENS] * len(images)


@pytest.mark.parametrize("method", ["evs", "fastervlm"])
def test_frames_of_a_video_share_a_budget(method):
    model, processor = GEMMA4.build(torch.float32), gemma4_processor()
    inputs = dict(
        processor(text=["what is shown here ? <|video|> describe ."], videos=[[clip("coffee", 4)]], return_tensors="pt")
    )
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.25):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
    (video,) = run.videos
    assert len(video.kept_by_frame) == 4
    assert len(video.kept) == round(0.25 * video.total)
    by_hand = row_by_layers(model, inputs, run, 0, default_positions(model, method))
    torch.testing.assert_close(logits[0, by_hand.columns], by_hand.logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_those_of_plain_attention_by_places(case):
    """`fastervlm` keeps what receives most attention of a tower read patch by patch, whatever order the patches come in."""
    model, inputs = case.build(torch.float32), case.inputs([[2, "A", 1, "small", 3], ["large", 2]])
    shuffled = torch.randperm(inputs["pixel_values"].shape[1], generator=torch.Generator().manual_seed(3))
    inputs["pixel_values"] = inputs["pixel_values"][:, shuffled]
    inputs["image_position_ids"] = inputs["image_position_ids"][:, shuffled]
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=5):
        model(**inputs)
        images = vlmprune.last_run(model).images
    scores = received_by_cells(model, inputs["pixel_values"], inputs["image_position_ids"])
    for image, expected in zip(images, scores, strict=True):
        assert image.kept.tolist() == expected.topk(5).indices.sort().values.tolist()


def test_scores_are_those_of_plain_attention_by_cells():
    """`fastervlm` keeps the cells whose patches receive most attention in the eager maps of the last layer."""
    model, inputs = GEMMA3.build(torch.float32), GEMMA3.inputs([[2, "A", 1, "B", 3]])
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=5):
        model(**inputs)
        images = vlmprune.last_run(model).images
    patches = torch.arange(SIDE // PATCH)
    places = torch.stack(torch.meshgrid(patches, patches, indexing="xy"), -1).flatten(0, 1)
    cells = round(TOKENS**0.5)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    try:
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
    finally:
        tower.set_attn_implementation("sdpa")
    for image, weights in zip(images, maps, strict=True):
        scores = torch.zeros(TOKENS)
        for patch, (x, y) in enumerate(places.tolist()):
            scores[y * cells // len(patches) * cells + x * cells // len(patches)] += weights[:, :, patch].mean()
        assert image.kept.tolist() == scores.topk(5).indices.sort().values.tolist()
