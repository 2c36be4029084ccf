"""Time: clips that stand still, stretches that do, and cuts."""

from dataclasses import replace

import pytest
import torch

from support.method_batches import random_batch
from vlmprune.layout import raster_layout
from vlmprune.methods.needs import VIDEOS
from vlmprune.methods.registry import METHODS, get_method, make_method

ROWS, COLUMNS = 4, 5
TOKENS = ROWS * COLUMNS
# Of a still clip whose budget is one frame, every place stays once.
ONCE = [
    ("evs", {}),
    ("divprune", {}),
    ("divprune", {"per": "video"}),
    ("holitom", {}),
    # Cuts that a clip has not would give every scene its part.
    ("fastvid", {"scenes": 1}),
    # What is picked is picked in every frame; the trees of the others are what time merges.
    ("flashvid", {"alpha": 0.0, "min_segments": 1}),
]
# All frames are alike to it: an even budget, at the same places or not.
DOES_NOT_CLAIM_IT = {"vidcom2"}


def scene(seed, frames=1, noise=0.0):
    """The same picture in every frame, `[frames, tokens, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, TOKENS, 16, generator=generator).expand(frames, -1, -1)
    return still + noise * torch.randn(frames, TOKENS, 16, generator=generator)


def kept_of(name, parameters, video, keep):
    """Return the kept tokens of a video `[frames, tokens, dim]` as a bool mask `[frames, tokens]`."""
    method = make_method(name, keep=keep, **parameters)
    batch = random_batch(method, [raster_layout(ROWS, COLUMNS, len(video))], 0)
    selection = method.select(replace(batch, features=video.flatten(0, 1)))
    mask = torch.zeros(len(video) * TOKENS, dtype=torch.bool).index_fill(0, selection.kept, True)
    return mask.view(len(video), TOKENS)


@pytest.mark.parametrize(("name", "parameters"), ONCE)
@pytest.mark.parametrize("frames", [2, 8])
def test_a_static_clip_does_not_spend_its_budget_twice(name, parameters, frames):
    mask = kept_of(name, parameters, scene(1, frames), TOKENS)
    assert mask.sum(0).tolist() == [1] * TOKENS


def test_every_method_for_videos_is_here():
    videos_only = {name for name in METHODS if VIDEOS in get_method(name).needs}
    assert videos_only == {name for name, _ in ONCE if name != "divprune"} | DOES_NOT_CLAIM_IT


# FlashVID's budget is even over frames, so each of two scenes has room for its places where they are equally long.
CUTS = [
    (*case, cut) for case in ONCE if case[0] != "divprune" for cut in (1, 4, 7) if case[0] != "flashvid" or cut == 4
]


@pytest.mark.parametrize(("name", "parameters", "cut"), CUTS)
def test_of_two_still_scenes_each_is_kept_once(name, parameters, cut):
    """Every place of both, from one side of the cut and from the other."""
    video = torch.cat([scene(1, cut), scene(2, 8 - cut)])
    mask = kept_of(name, parameters, video, 2 * TOKENS)
    assert mask[:cut].sum(0).tolist() == mask[cut:].sum(0).tolist() == [1] * TOKENS


def test_a_static_stretch_gets_nothing_and_a_cut_gets_all():
    """Two scenes of four frames: the first frame of each, and nothing of the frames that repeat it."""
    video = torch.cat([scene(1, 4), scene(2, 4)])
    assert kept_of("evs", {}, video, 2 * TOKENS).sum(1).tolist() == [TOKENS, 0, 0, 0, TOKENS, 0, 0, 0]


def test_what_moves_in_a_still_scene_is_kept():
    video = scene(1, 6).clone()
    # One thing, somewhere else in every frame.
    for frame in range(6):
        video[frame, frame] = 5.0 * torch.ones(16)
    mask = kept_of("evs", {}, video, TOKENS + 10)
    assert mask[0].all()
    # Where it is now, and where it was.
    assert [row.nonzero().flatten().tolist() for row in mask[1:]] == [[frame, frame + 1] for frame in range(5)]


def test_more_of_a_frame_unlike_the_others_and_at_most_twice_the_average():
    video = torch.cat([scene(1, 5, 0.05), scene(2), scene(1, 2, 0.05)])
    kept = kept_of("vidcom2", {}, video, 0.25).sum(1)
    assert int(kept.sum()) == round(0.25 * video.shape[0] * TOKENS)
    assert int(kept.argmax()) == 5
    assert int(kept[5]) <= 2 * 0.25 * TOKENS + 1


def test_identical_frames_are_all_alike_to_vidcom2():
    counts = kept_of("vidcom2", {}, scene(1, 4), 0.25).sum(1).tolist()
    assert counts == [TOKENS // 4] * 4


@pytest.mark.parametrize("keep", [0.05, 3])
def test_evs_never_keeps_less_than_the_first_frame(keep):
    mask = kept_of("evs", {}, scene(1, 6, 1.0), keep)
    assert mask.sum(1).tolist() == [TOKENS, 0, 0, 0, 0, 0]


def test_scores_in_the_dtype_of_the_model_can_be_had():
    """In bf16 small changes round to nothing, and the earliest frames win."""
    generator = torch.Generator().manual_seed(0)
    steps = 0.02 * torch.arange(1, 6).view(-1, 1, 1) * torch.randn(5, TOKENS, 16, generator=generator)
    video = torch.cat([scene(1), scene(1, 5) + steps]).bfloat16()
    wide, narrow = (kept_of("evs", {"dtype": dtype}, video, 50) for dtype in ("float32", "model"))
    assert int(wide.sum()) == int(narrow.sum()) == 50
    assert not torch.equal(wide, narrow)
