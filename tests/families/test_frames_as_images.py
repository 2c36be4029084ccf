"""A video whose frames stand still for a temporal patch is to a Qwen-VL tower so many images: methods choose the same in both."""

import pytest
import torch

import vlmprune
from support.families import qwen2_5_vl, qwen2_vl, qwen3_vl
from support.families.qwen_case import IMAGE_GRIDS, VIDEO_TOKEN, VISION_END, VISION_START, token_types
from support.matrix import HARDER
from vlmprune.methods import PictureMethod
from vlmprune.methods.needs import STILL_IMAGES
from vlmprune.methods.registry import METHODS, make_method

NAMES = ("A", "B", "C")
FRAME_BY_FRAME = [
    name
    for name, cls in METHODS.items()
    if issubclass(cls, PictureMethod) and STILL_IMAGES not in cls.needs and make_method(name).frame_by_frame
]


@pytest.mark.parametrize("case", [qwen2_vl.CASES[0], qwen2_5_vl.CASES[0], qwen3_vl.CASES[0]], ids=str)
@pytest.mark.parametrize("name", FRAME_BY_FRAME)
def test_frames_keep_what_images_keep(name, case):
    parameters = {key: value for key, value in HARDER.get(name, {}).items() if key not in ("tau", "layer")}
    if name == "todre":
        parameters["relevance"] = False
    model = case.build(torch.float32)
    images, video = case.inputs([[2, *NAMES, 3]]), case.inputs([[2, "video", 3]])
    # The pixels of the images are one frame twice, as the processor makes a temporal patch of a picture.
    frames, rows, columns = 3, *IMAGE_GRIDS["default"][1:]
    video = {**video, **as_video(case, images, frames, rows, columns)}
    budget = rows * columns // 4 // 3
    with torch.no_grad():
        with vlmprune.pruned(model, name, keep=budget, **parameters):
            model(**images)
            single = [image.kept.tolist() for image in vlmprune.last_run(model).images]
        with vlmprune.pruned(model, name, keep=frames * budget, **parameters):
            model(**video)
            (record,) = vlmprune.last_run(model).videos
    assert [frame.tolist() for frame in record.kept_by_frame] == single
    assert record.kept_per_frame == [len(kept) for kept in single]


def as_video(case, images, frames, rows, columns):
    """Return the inputs of a video whose frames are these images."""
    tokens = rows * columns // 4
    ids = [5, 6]
    if case.timestamps:
        for frame in range(frames):
            ids += [50 + frame, 60, VISION_START, *[VIDEO_TOKEN] * tokens, VISION_END]
    else:
        ids += [VISION_START, *[VIDEO_TOKEN] * (frames * tokens), VISION_END]
    found = torch.tensor([[*ids, 7, 8, 9]])
    return {
        "input_ids": found,
        "attention_mask": torch.ones_like(found),
        "mm_token_type_ids": token_types(found),
        "pixel_values_videos": images["pixel_values"],
        "video_grid_thw": torch.tensor([[frames, rows, columns]]),
    }
