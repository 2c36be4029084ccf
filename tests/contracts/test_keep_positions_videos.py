"""`keep_positions=True` on videos: as many tokens as without it, those that carry position among them, and decoding."""

import pytest
import torch

import vlmprune
from support.layerwise import (
    Positions,
    default_positions,
    language_model_inputs,
    placeholders,
)
from support.matrix import METHOD_PARAMETERS, fitting
from support.position_ranks import ranked
from support.video_by_hand import check_by_hand
from support.video_matrix import ONE_OF_EACH_KIND, as_served
from vlmprune.methods.registry import make_method

ROWS = [[2, "A", 3, "video", 4], [1, "video small", 2], [6]]
# Without its inner step, which folds tokens that then stay by their position.
PARAMETERS = {**METHOD_PARAMETERS, "holitom": {"tau": 0.2}}
# By frame and by video, merging over time, and in the layers.
METHODS = ("divprune", "evs", "vidcom2", "flashvid", "fastvid", "holitom", "fastv")
over_cases = pytest.mark.parametrize(
    ("method", "case"),
    [
        pytest.param(name, fitting(name, family), id=f"{name}-{family}")
        for name in METHODS
        for family in ONE_OF_EACH_KIND
    ],
)


def applied(model, method, keep=0.4, **more):
    return vlmprune.pruned(model, method, keep=keep, **PARAMETERS[method], **more)


@over_cases
def test_the_budget_is_met_and_positions_are_among_them(method, case):
    model, inputs = case.build(torch.float32), case.inputs(as_served(method, case, ROWS))
    with torch.no_grad(), applied(model, method, keep_positions=True):
        model(**inputs)
        run = vlmprune.last_run(model)
    asked = make_method(method, keep=0.4, **PARAMETERS[method])
    given = language_model_inputs(model, inputs)["position_ids"]
    if given is None:
        given = inputs["attention_mask"].cumsum(1) - 1
    for video in run.videos:
        earlier = [image for image in run.images if image.batch_index == video.batch_index]
        before = sum(image.total for image in earlier[: earlier.index(video)])
        visual = placeholders(model, inputs["input_ids"][video.batch_index]).nonzero().flatten()
        columns = visual[before : before + video.total]
        positions = given[:, video.batch_index] if given.ndim == 3 else given[video.batch_index]
        kept = next(kept for _, kept in video.stages if len(kept) < video.total)
        tokens = torch.arange(video.total)
        if asked.site == "input":
            # A newline stays and does not count. The budget is met, also where the method alone would keep less.
            tokens = tokens[~video.layout.newline]
            frames = video.layout.frames
            assert sum(video.kept_per_frame) == asked.video_budget(frames, len(tokens) // frames)
        ranks = ranked(model, positions, columns[tokens])
        count = 2 * round(0.2 * int(torch.isin(tokens, kept).sum()))
        assert count > 0
        sure = {token for token, rank in zip(tokens.tolist(), ranks, strict=True) if rank < count // 2 - 2}
        assert sure <= set(kept.tolist())


@over_cases
def test_layers_and_decode_steps_by_hand(method, case):
    model, inputs = case.build(torch.float32), case.inputs(as_served(method, case, ROWS))
    trimmed = default_positions(model, make_method(method, keep=0.4, **PARAMETERS[method])).trimmed
    # Those of the full prompt in every family.
    check_by_hand(model, inputs, method, applied(model, method, keep_positions=True), Positions(False, False, trimmed))


@over_cases
def test_identity(method, case):
    model, inputs = case.build(torch.float32), case.inputs(as_served(method, case, ROWS))
    with torch.no_grad():
        logits = model(**inputs).logits
        with applied(model, method, 1.0, keep_positions=True):
            assert torch.equal(model(**inputs).logits, logits)
