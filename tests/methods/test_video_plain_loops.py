"""Which tokens a pruned model keeps of videos, against plain loops on what the unpatched model encodes."""

import pytest
import torch

import vlmprune
from support.plain_methods.evs import evs
from support.plain_methods.vidcom2 import vidcom2
from support.video_matrix import VIDEO_CASES, as_served

PLAIN = {"evs": evs, "vidcom2": vidcom2}
ROWS = {
    "single": [[3, "video", 4]],
    "three rows": [[2, "A", 3, "video", 4], [1, "video small", 2, "video large", 2], [1, "video B", 6]],
}


def encoded(model, inputs):
    """The features of every video of a call, `[tokens, dim]`, as the unpatched model makes them."""
    # The first argument has another name in transformers 5.17.
    grid = {name: inputs[name] for name in ("video_grid_thw",) if name in inputs}
    found = model.model.get_video_features(inputs["pixel_values_videos"], **grid).pooler_output
    return [features.reshape(-1, features.shape[-1]) for features in found]


@pytest.mark.parametrize("case", VIDEO_CASES, ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", PLAIN)
def test_kept_tokens_are_those_of_plain_loops(name, rows, case):
    model, inputs = case.build(torch.float32), case.inputs(as_served(name, case, rows))
    with torch.no_grad():
        features = encoded(model, inputs)
        for keep in (0.3, 0.55, 17):
            with vlmprune.pruned(model, name, keep=keep):
                model(**inputs)
                videos = vlmprune.last_run(model).videos
            assert len(videos) == len(features)
            for video, own in zip(videos, features, strict=True):
                patches = int((~video.layout.newline).sum())
                plain = PLAIN[name](own[:patches].unflatten(0, (video.layout.frames, -1)), keep)
                assert video.kept.tolist() == [*plain, *range(patches, video.total)]
