"""The contracts on videos: alone, several of different lengths, beside images in one prompt and one batch."""

import pytest
import torch

import vlmprune
from support.layerwise import check_greedy, default_positions, language_model_inputs, row_by_layers
from support.matrix import FOLLOW_THE_QUESTION, METHOD_PARAMETERS
from support.merging import entering, given_as_entered
from support.video_matrix import ROWS, as_served, over_video_matrix, replaces_values
from vlmprune.methods.registry import make_method

over_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def pruned(model, method, keep):
    """The method as the matrix runs it."""
    return vlmprune.pruned(model, method, keep=keep, **METHOD_PARAMETERS[method])


@over_video_matrix
@over_rows
def test_pruned_forward_and_decode_equal_the_layers_by_hand(method, case, rows):
    rows, steps = as_served(method, case, rows), 4
    model, inputs = case.build(torch.float32), case.inputs(rows)
    with torch.no_grad(), pruned(model, method, 0.4), entering(model) as entered:
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, -steps:]
    as_run = make_method(method, keep=0.4, **METHOD_PARAMETERS[method])
    given, positions = language_model_inputs(model, inputs), default_positions(model, as_run)
    if replaces_values(method):
        given = given_as_entered(model, given, entered[0], inputs, run)
    for row in range(len(rows)):
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)
        check_greedy(model, inputs, run, row, positions, new[row], given)
        assert run.visual_tokens_per_layer[row][-1] == len(by_hand.columns) - run.text_tokens[row]


@over_video_matrix
def test_budgets_and_newlines(method, case):
    rows = as_served(method, case, ROWS["mixed"])
    model, inputs = case.build(torch.float32), case.inputs(rows)
    with torch.no_grad(), pruned(model, method, 0.4):
        model(**inputs)
        run = vlmprune.last_run(model)
    asked = make_method(method, keep=0.4, **METHOD_PARAMETERS[method])
    for video in run.videos:
        newlines = video.layout.newline.nonzero().flatten()
        # Inside the language model a newline is a token as any other.
        assert set(newlines.tolist()) <= set(video.stages[0][1].tolist())
        frames, patches = video.layout.frames, video.total - len(newlines)
        assert sum(video.kept_per_frame) == len(video.kept) - int(torch.isin(newlines, video.kept).sum())
        if asked.site == "input" and not asked.merges and len(asked.parts()) == 1:
            assert sum(video.kept_per_frame) == asked.video_budget(frames, patches // frames)
        assert len(video.kept) < video.total


@over_video_matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keep_everything_is_bit_identical_and_undone(method, case, dtype):
    model, inputs = case.build(dtype), case.inputs(as_served(method, case, ROWS["mixed"]), dtype=dtype)
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with pruned(model, method, 1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
        with pruned(model, method, 0.4):
            assert model(**inputs).logits.isfinite().all()
        assert torch.equal(model(**inputs).logits, logits)


@over_video_matrix
@pytest.mark.parametrize("padding", ["left", "right"])
def test_row_in_a_batch_equals_row_alone(method, case, padding):
    rows = [row for row in as_served(method, case, ROWS["mixed"]) if served_alone(method, row)]
    model, batch = case.build(torch.float32), case.inputs(rows, padding)
    with torch.no_grad(), pruned(model, method, 0.4):
        together = model(**batch).logits
        run = vlmprune.last_run(model)
        for row, items in enumerate(rows):
            alone = model(**case.inputs([items])).logits[0]
            expected = [image.kept.tolist() for image in vlmprune.last_run(model).images]
            assert [image.kept.tolist() for image in run.images if image.batch_index == row] == expected
            valid = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, valid], alone, atol=2e-5, rtol=1e-4)


@over_video_matrix
def test_cache_beams_and_a_second_turn(method, case):
    rows = as_served(method, case, [[2, "A", 3, "video", 4], [1, "video small", 2], [6]])
    model, inputs = case.build(torch.float32), case.inputs(rows)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), pruned(model, method, 0.4):
        tokens = model.generate(**inputs, **greedy)
        if method not in FOLLOW_THE_QUESTION:
            assert torch.equal(tokens, model.generate(**inputs, **greedy, use_cache=False))
        beams = model.generate(**inputs, **greedy, num_beams=2, num_return_sequences=2)
        for row, items in enumerate(rows):
            alone = model.generate(**case.inputs([items]), **greedy, num_beams=2, num_return_sequences=2)
            assert beams[2 * row : 2 * row + 2, -4:].tolist() == alone[:, -4:].tolist()


def served_alone(method, row):
    """Whether a method serves a row without its neighbours: those for videos refuse images alone."""
    names = [item for item in row if isinstance(item, str)]
    parts = make_method(method, **METHOD_PARAMETERS[method]).parts()
    return (
        not names
        or any("video" in name for name in names)
        or not any(need.name == "videos" for part in parts for need in part.needs)
    )
