"""LLaVA-NeXT-Video: where the tokens of frames are, and what the CLS tokens of frames say of them."""

import pytest
import torch

import vlmprune
from support.families.llava_next import CUTS
from support.families.llava_next_video import FRAMES, LLAVA_NEXT_VIDEO
from support.plain_tower import plain_image
from vlmprune.errors import LayoutError
from vlmprune.patches.families.registry import find_family
from vlmprune.patches.tower.encoded_visuals import EncodedVisuals


@pytest.fixture(scope="module")
def model():
    return LLAVA_NEXT_VIDEO.build(torch.float32)


def test_layouts_of_images_and_videos(model):
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=0.5):
        model(**LLAVA_NEXT_VIDEO.inputs([[2, "A", 3, "video large", 2], [1, "small", 4]]))
        image, video, small = vlmprune.last_run(model).images
    assert (image.modality, image.total, small.total) == ("image", CUTS["default"][1], CUTS["small"][1])
    assert (video.modality, video.total, video.layout.frames) == ("video", 4 * FRAMES["video large"], 8)
    assert video.layout.tile_grid == (2, 2)
    assert not video.layout.newline.any()
    assert video.kept_per_frame == [2] * 8


@pytest.mark.parametrize("name", ["video small", "video large"])
def test_signals_are_pooled_as_the_host_pools_features(model, name):
    frames = FRAMES[name]
    family = find_family(model)
    maps = torch.randn(2 * frames, 1 + 25, 16)
    pooled = model.model.vision_resampler(maps[:, 1:])
    visuals = EncodedVisuals("video", {}, (frames * 4,) * 2, {})
    values = family.token_vision(maps, visuals, family.layouts(visuals))
    torch.testing.assert_close(values, pooled.flatten(0, 1))
    # What the projector gets is pooled already.
    assert torch.equal(family.token_vision(pooled, visuals, family.layouts(visuals)), pooled.flatten(0, 1))


def test_frames_are_scored_by_their_cls_token(model):
    inputs = LLAVA_NEXT_VIDEO.inputs([[2, "video", 3]])
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=1 / 4):
        model(**inputs)
        run = vlmprune.last_run(model)
    assert run.signal.startswith("cls_attention")
    plain = [plain_image(model, frame[None]) for frame in inputs["pixel_values_videos"][0]]
    attention = torch.stack([frame.looked_at(frame.feature_layer).mean(0) for frame in plain])
    pooled = torch.nn.functional.avg_pool2d(attention.view(-1, 5, 5), 2).flatten(1)
    assert [kept.tolist() for kept in run.videos[0].kept_by_frame] == [[int(scores.argmax())] for scores in pooled]


def test_features_of_frames_given_one_by_one_are_counted(model):
    """As transformers 5.17 gives them."""
    assert find_family(model).token_counts("video", [torch.zeros(3, 4, 8), torch.zeros(12, 8)]) == (12, 12)


def test_tokens_that_make_no_whole_frames_are_refused(model):
    family = find_family(model)
    with pytest.raises(LayoutError, match=r"packed \[13\] visual tokens per video"):
        family.layouts(EncodedVisuals("video", {}, (13,), {}))


def test_visionzip_sends_the_cls_tokens_of_frames(model):
    inputs = LLAVA_NEXT_VIDEO.inputs([[2, "video", 3], [1, "A", 2]])
    with torch.no_grad(), vlmprune.pruned(model, "visionzip", keep=0.75):
        assert model(**inputs).logits.isfinite().all()
        assert vlmprune.last_run(model).videos[0].kept_per_frame == [3] * 6
