"""What goes wrong with videos: refused by name, and never served as if they were images."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch

import vlmprune
from support.families import llava_next_video, llava_onevision, qwen2_5_vl, qwen3_vl
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import LayoutError, UnknownNameError, UnsupportedCallError, UnsupportedMethodError
from vlmprune.methods import InputMethod
from vlmprune.methods.batch import Selection
from vlmprune.methods.needs import VIDEOS

CASES = (qwen2_5_vl.CASES[0], qwen3_vl.CASES[0], llava_onevision.CASES[0], llava_next_video.CASES[0])
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_methods = pytest.mark.parametrize("method", ["evs", "vidcom2"])


@over_methods
def test_a_family_without_videos_is_refused(method):
    model = LLAVA_CLIP_GQA.build(torch.float32)
    assert method not in vlmprune.list_methods(model)
    with pytest.raises(
        UnsupportedMethodError, match=rf"'{method}' needs videos, .* Families that have them: .*Qwen2-VL"
    ):
        vlmprune.apply(model, method)


@over_cases
@over_methods
def test_images_alone_are_refused_and_images_beside_a_video_stay_whole(case, method):
    model, images = case.build(torch.float32), case.inputs([[2, "A", 3], [1, "B", 2]])
    mixed, text = case.inputs([[2, "A", 1, "video", 3], [1, "B", 2]]), case.inputs([[5]])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.4):
        for call in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(UnsupportedMethodError, match=rf"'{method}' does not serve images, .* it needs videos"):
                call(**images)
        model(**mixed)
        records = vlmprune.last_run(model).images
        assert [(image.modality, len(image.kept) == image.total) for image in records] == [
            ("image", True),
            ("video", False),
            ("image", True),
        ]
        model(**text)
        with vlmprune.options(model, keep=1.0):
            model(**images)
            assert all(len(image.kept) == image.total for image in vlmprune.last_run(model).images)


@over_methods
def test_frames_of_features_merged_by_hand_are_known_to_nobody(method):
    case = qwen2_5_vl.CASES[0]
    model, inputs = case.build(torch.float32), case.inputs([[9]])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, 2:7] = True
    with (
        torch.no_grad(),
        vlmprune.pruned(model, method, keep=0.4),
        vlmprune.options(model, visual_mask=mask),
        pytest.raises((UnsupportedCallError, UnsupportedMethodError), match=rf"'{method}' .*(videos|images)"),
    ):
        model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])


@over_cases
def test_a_video_shorter_than_a_window_is_refused_before_anything_is_chosen(case):
    @dataclass(frozen=True, kw_only=True)
    class Windowed(InputMethod):
        """Needs so many frames."""

        window: int = 5

        name: ClassVar[str] = "windowed"
        needs: ClassVar[frozenset] = frozenset({VIDEOS})

        def check_video(self, frames, rows, columns):
            if frames < self.window:
                raise LayoutError(
                    f"'windowed' needs {self.window} frames; the video has {frames} of {rows} x {columns}."
                )

        def select(self, batch):
            assert min(layout.frames for layout in batch.layouts) >= self.window
            return Selection(torch.cat([torch.arange(budget) for budget in batch.budgets]), batch.budgets)

    model, inputs = case.build(torch.float32), case.inputs([[2, "video", 3]])
    with torch.no_grad():
        with vlmprune.pruned(model, Windowed(keep=0.4, window=99)):
            with pytest.raises(LayoutError, match=r"needs 99 frames; the video has \d"):
                model(**inputs)
            with vlmprune.options(model, keep=1.0):
                model(**inputs)
        with vlmprune.pruned(model, Windowed(keep=0.4, window=1)):
            model(**inputs)
            (video,) = vlmprune.last_run(model).videos
            assert len(video.kept) < video.total


@over_cases
def test_grids_of_other_pixels_are_refused(case):
    model, inputs = case.build(torch.float32), case.inputs([[2, "video", 3]])
    if "video_grid_thw" in inputs:
        changed = {"video_grid_thw": inputs["video_grid_thw"] + torch.tensor([1, 0, 0])}
    else:
        changed = {"pixel_values_videos": inputs["pixel_values_videos"][:, :-1]}
    # Where there is no grid, placeholders and features are compared.
    with (
        torch.no_grad(),
        vlmprune.pruned(model, "evs", keep=0.4),
        pytest.raises((LayoutError, ValueError), match=r"grid_thw|[Vv]ideo features and video tokens"),
    ):
        model(**{**inputs, **changed})


def test_a_choice_of_frames_that_does_not_exist():
    with pytest.raises(UnknownNameError, match=r"Unknown per 'frames'.*'frame'.*frame, video"):
        vlmprune.methods.FasterVLM(per="frames")
    with pytest.raises(UnknownNameError, match="parameter of visionzip"):
        vlmprune.methods.VisionZip(per="video")


@over_cases
def test_methods_for_images_alone_refuse_videos_by_name(case):
    model, inputs = case.build(torch.float32), case.inputs([[2, "video", 3]])
    for name in {"holov", "zooprune", "hired", "globalcom2", "tokencorr"} & set(vlmprune.list_methods(model)):
        with (
            torch.no_grad(),
            vlmprune.pruned(model, name, keep=0.3),
            pytest.raises(UnsupportedMethodError, match=rf"'{name}' does not serve videos.* evs, "),
        ):
            model(**inputs)
