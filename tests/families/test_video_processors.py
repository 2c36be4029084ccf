"""Videos through the hosts' own processors: clips of numpy frames, with a photograph and a text-only row beside them."""

import pytest
import torch

import vlmprune
from support.families.by_hand import check_pruned, language_model_inputs
from support.families.llava_next_video import LLAVA_NEXT_VIDEO
from support.families.llava_onevision import LLAVA_ONEVISION
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen2_vl import QWEN2_VL
from support.families.qwen3_vl import QWEN3_VL
from support.families.real_processors import (
    NEXT_VIDEO_PATCH,
    QWEN_PATCH,
    clip,
    next_video_processor,
    onevision_processor,
    photograph,
    qwen_processor,
    with_patches,
)

QWEN = {"Qwen2VLProcessor": QWEN2_VL, "Qwen2_5_VLProcessor": QWEN2_5_VL, "Qwen3VLProcessor": QWEN3_VL}
PICTURE, CLIP = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))


def qwen(name):
    processor = qwen_processor(name)
    clips = [clip("astronaut", 6), clip("coffee", 5, height=160, width=112)]
    settings = {"fps": 2.0}
    if name == "Qwen3VLProcessor":
        about = [
            {"fps": 2.0, "frames_indices": list(range(len(frames))), "total_num_frames": len(frames)}
            for frames in clips
        ]
        settings = {"video_metadata": [[each] for each in about]}
    inputs = processor(
        text=[f"what is {CLIP} and {PICTURE} ?", f"describe the clip . {CLIP} yes or no", "what is a clip ?"],
        images=[photograph("coffee")],
        videos=clips,
        padding=True,
        return_tensors="pt",
        **settings,
    )
    return with_patches(QWEN[name], QWEN_PATCH[name]), dict(inputs), [3, 3]


def onevision():
    inputs = onevision_processor()(
        text=["what is <video> and <image> ?", "describe the clip . <video> yes or no", "what is a clip ?"],
        images=[photograph("coffee")],
        videos=[clip("astronaut", 4), clip("chelsea", 4)],
        padding=True,
        return_tensors="pt",
    )
    return LLAVA_ONEVISION.build(torch.float32), dict(inputs), [4, 4]


def next_video():
    inputs = next_video_processor()(
        text=["what is <video> and <image> ?", "describe the clip . <video> yes or no", "what is a clip ?"],
        images=[photograph("coffee")],
        videos=[clip("astronaut", 4), clip("chelsea", 4)],
        padding=True,
        return_tensors="pt",
    )
    return with_patches(LLAVA_NEXT_VIDEO, NEXT_VIDEO_PATCH), dict(inputs), [4, 4]


OTHERS = {"LlavaOnevisionProcessor": onevision, "LlavaNextVideoProcessor": next_video}


@pytest.fixture(scope="module", params=[*QWEN, *OTHERS])
def request_of(request):
    return qwen(request.param) if request.param in QWEN else OTHERS[request.param]()


@pytest.mark.parametrize("method", ["uniform", "divprune", "evs", "vidcom2", "fastervlm"])
def test_pruned_call_equals_the_unpatched_language_model_by_hand(request_of, method):
    model, inputs, frames = request_of
    given = language_model_inputs(model, inputs)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.4):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
    assert [(image.batch_index, image.modality) for image in run.images] == [(0, "video"), (0, "image"), (1, "video")]
    assert [len(video.kept_by_frame) for video in run.videos] == frames
    # The newline behind a video of OneVision always stays and is not counted.
    patches = [int((~video.layout.newline).sum()) for video in run.videos]
    assert [sum(video.kept_per_frame) for video in run.videos] == [round(0.4 * number) for number in patches]
    check_pruned(model, inputs, run, logits, new, given)


def test_keep_everything_is_bit_identical(request_of):
    model, inputs, _ = request_of
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with vlmprune.pruned(model, "divprune", keep=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


def test_repeated_frames_are_dropped_first(request_of):
    """Of two equal frames no place is kept twice as long as there are other tokens."""
    model, inputs, _ = request_of
    pixels = inputs["pixel_values_videos"].clone()
    if "video_grid_thw" in inputs:
        frame = int(inputs["video_grid_thw"][0, 1:].prod())
        pixels[frame : 2 * frame] = pixels[:frame]
    else:
        pixels[0, 1] = pixels[0, 0]
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        model(**{**inputs, "pixel_values_videos": pixels})
        first, second, *_ = vlmprune.last_run(model).videos[0].kept_by_frame
    assert set(first.tolist()).isdisjoint(second.tolist())
