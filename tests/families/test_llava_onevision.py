"""LLaVA-OneVision: what its calls may look like, videos, and calls that cannot be served."""

import pytest
import torch

import vlmprune
from support.families.llava_onevision import CUTS, FRAMES, LLAVA_ONEVISION, VIDEO_TOKEN
from vlmprune.errors import LayoutError, UnsupportedMethodError
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.families.llava_onevision import video_layout
from vlmprune.patches.families.registry import find_family
from vlmprune.patches.tower.encoded_visuals import EncodedVisuals


def run_of(model, inputs, method="hired", **parameters):
    """Return logits and record of a pruned prefill."""
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **parameters):
        logits = model(**inputs).logits
        return logits, vlmprune.last_run(model)


def test_record_of_several_sizes_a_row_without_image_and_a_video():
    rows = [[3, "A", 4], [2, "small", 1, "large", 3], [9], [1, "video", 2, "wide", 1]]
    _, run = run_of(LLAVA_ONEVISION.build(torch.float32), LLAVA_ONEVISION.inputs(rows), "divprune")
    names = ["A", "small", "large", "video", "wide"]
    totals = [LLAVA_ONEVISION.tokens(name) for name in names]
    assert [(image.batch_index, image.total) for image in run.images] == list(zip([0, 1, 1, 3, 3], totals, strict=True))
    # The newline behind the video is not counted, and always kept.
    kept = [
        round(0.3 * total) if name != "video" else round(0.3 * (total - 1)) + 1
        for name, total in zip(names, totals, strict=True)
    ]
    assert [len(image.kept) for image in run.images] == kept
    assert run.text_tokens == [7, 6, 9, 4]


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_layout_of_a_video(frames):
    layout = video_layout(frames, 3)
    assert layout.total == frames * 9 + 1
    assert layout.newline.tolist() == [False] * 9 * frames + [True]
    assert layout.frame.tolist() == [frame for frame in range(frames) for _ in range(9)] + [frames - 1]
    assert layout.row[:9].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert layout.column[-4:].tolist() == [0, 1, 2, -1]
    assert (layout.grid, layout.crops, layout.tile_grid) == (None, None, (3, 3))


@pytest.mark.parametrize("name", ["video small", "video large"])
def test_video_tokens_are_where_the_host_pools_them(name):
    """A signal that is a linear function of the features is pooled as the host pools features."""
    model, frames = LLAVA_ONEVISION.build(torch.float32), FRAMES[name]
    family = find_family(model)
    maps = torch.randn(2 * frames, 25, 4)
    pooled = model.model.apply_pooling(maps).reshape(2, frames * 9, 4)
    newline = torch.zeros(2, 1, 4)
    visuals = EncodedVisuals("video", {}, (frames * 9 + 1,) * 2, {})
    values = family.token_vision(maps, visuals, family.layouts(visuals))
    torch.testing.assert_close(values, torch.cat([pooled, newline], 1).flatten(0, 1))


@pytest.mark.parametrize("method", ["tokencorr", "zooprune", "hired", "globalcom2"])
def test_methods_that_do_not_serve_videos_say_so(method):
    model = LLAVA_ONEVISION.build(torch.float32)
    for row in ([2, "video", 3], [2, "video", 3, "A"]):
        inputs = LLAVA_ONEVISION.inputs([row])
        with pytest.raises(UnsupportedMethodError, match=r"videos.*random, uniform,.* divprune"):
            run_of(model, inputs, method)
        with (
            pytest.raises(UnsupportedMethodError, match="videos"),
            torch.no_grad(),
            vlmprune.pruned(model, method, keep=0.3),
        ):
            model.generate(**inputs, max_new_tokens=2)
    assert len(run_of(model, LLAVA_ONEVISION.inputs([[2, "A", 3]]), method)[1].images) == 1


def test_towers_without_cls_token_are_scored_by_received_attention():
    model = LLAVA_ONEVISION.build(torch.float32)
    _, run = run_of(model, LLAVA_ONEVISION.inputs([[2, "A", 3]]), "fastervlm")
    assert run.signal == "received_attention layer 2"
    facts = find_family(model).tower_facts
    assert facts.attention(facts.feature_layer) == VisionSignal("received_attention", 2)


def test_another_number_of_crops_before_interpolation():
    """`vision_aspect_ratio` of the configuration decides, as for the host."""
    model, inputs = LLAVA_ONEVISION.build(torch.float32), LLAVA_ONEVISION.inputs([[2, "A", 3]])
    previous, model.config.vision_aspect_ratio = model.config.vision_aspect_ratio, "anyres_max_9"
    try:
        with pytest.raises(ValueError, match="do not match"):
            run_of(model, inputs)
        total = 25 + 8 * 16
        inputs["input_ids"] = torch.cat(
            [torch.full((1, total), model.config.image_token_id), torch.tensor([[5, 6]])], 1
        )
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        _, run = run_of(model, inputs)
    finally:
        model.config.vision_aspect_ratio = previous
    assert run.images[0].total == total


def test_placeholders_of_another_processor():
    model = LLAVA_ONEVISION.build(torch.float32)
    inputs = LLAVA_ONEVISION.inputs([[3, "A", 4]])
    inputs |= {key: inputs[key][:, 5:] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="do not match"):
        run_of(model, inputs)
    video = LLAVA_ONEVISION.inputs([[3, "video", 4]])
    video |= {key: video[key][:, 5:] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="do not match"):
        run_of(model, video, "random")


def test_images_in_the_wrong_order():
    model = LLAVA_ONEVISION.build(torch.float32)
    inputs, swapped = (LLAVA_ONEVISION.inputs([[3, a, 4], [3, b, 4]]) for a, b in (("small", "A"), ("A", "small")))
    inputs |= {key: swapped[key] for key in ("pixel_values", "image_sizes")}
    with pytest.raises(LayoutError, match="placeholders of row 0"):
        run_of(model, inputs)


def test_several_images_in_a_prompt_under_beams():
    """Every row's images are encoded once and shown by all its beams."""
    model = LLAVA_ONEVISION.build(torch.float32)
    inputs = LLAVA_ONEVISION.inputs([[2, "A", 3], [4, "small", 1], [7]])
    with torch.no_grad(), vlmprune.pruned(model, "hired", keep=0.3):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
        images = vlmprune.last_run(model).images
    assert [(image.batch_index, image.total) for image in images] == [
        *((row, CUTS["default"][1]) for row in (0, 1)),
        *((row, CUTS["small"][1]) for row in (2, 3)),
    ]


def test_video_placeholders_without_a_video_are_text():
    """Only what is encoded in a call is selected among."""
    model = LLAVA_ONEVISION.build(torch.float32)
    inputs = LLAVA_ONEVISION.inputs([[3, "A", 4]])
    inputs["input_ids"][0, 1] = VIDEO_TOKEN
    _, run = run_of(model, inputs)
    assert (len(run.images), run.text_tokens) == (1, [7])
