"""The contracts on videos: alone, several of different lengths, beside images in one prompt and one batch."""

import pytest
import torch

import vlmprune
from support.families.qwen_case import QwenCase
from support.layerwise import check_greedy, default_positions, language_model_inputs
from support.matrix import BY_ALL_TOKENS_OF_A_CALL, FOLLOW_THE_QUESTION, METHOD_PARAMETERS
from support.merging import entering, given_as_entered
from support.video_by_hand import check_by_hand
from support.video_matrix import ROWS, as_served, over_video_matrix, replaces_values
from vlmprune.methods.registry import make_method

GREEDY = {"max_new_tokens": 4, "do_sample": False}
PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids")

over_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def pruned(model, method, keep):
    """The method as the matrix runs it."""
    return vlmprune.pruned(model, method, keep=keep, **METHOD_PARAMETERS[method])


@over_video_matrix
@over_rows
def test_pruned_forward_and_decode_equal_the_layers_by_hand(method, case, rows):
    rows = as_served(method, case, rows)
    model, inputs = case.build(torch.float32), case.inputs(rows)
    as_run = make_method(method, keep=0.4, **METHOD_PARAMETERS[method])
    positions = default_positions(model, as_run)
    check_by_hand(model, inputs, method, pruned(model, method, 0.4), positions)


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
def test_cache_and_beams(method, case):
    rows = as_served(method, case, [[2, "A", 3, "video", 4], [1, "video small", 2], [6]])
    model, inputs = case.build(torch.float32), case.inputs(rows)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), pruned(model, method, 0.4):
        tokens = model.generate(**inputs, **greedy)
        if method not in FOLLOW_THE_QUESTION:
            assert torch.equal(tokens, model.generate(**inputs, **greedy, use_cache=False))
        if case.images_or_videos:
            # The host repeats encoded videos by the placeholder that it does not use for them.
            return
        beams = model.generate(**inputs, **greedy, num_beams=2, num_return_sequences=2)
        for row, items in enumerate(rows):
            alone = model.generate(**case.inputs([items]), **greedy, num_beams=2, num_return_sequences=2)
            assert beams[2 * row : 2 * row + 2, -4:].tolist() == alone[:, -4:].tolist()


@over_video_matrix
def test_second_turn_continues_the_returned_cache(method, case):
    """The video is in the first turn: what is kept of it stays, and positions go on as if all of it were there."""
    rows = as_served(method, case, [[2, "A", 3, "video", 4], [1, "video small", 2], [6]])
    model, first = case.build(torch.float32), case.inputs(rows)
    with torch.no_grad(), pruned(model, method, 0.4), entering(model) as entered:
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        run = vlmprune.last_run(model)
        ids = torch.cat([turn.sequences, torch.tensor([[21, 22, 23]] * len(rows))], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(len(rows), 7, dtype=torch.long)], 1)
        whole = case.longer(model, [first], ids, mask)
        text = {key: value for key, value in whole.items() if key in PROMPT}
        continued = model.generate(**text, past_key_values=turn.past_key_values, **GREEDY)
        if method not in FOLLOW_THE_QUESTION:
            assert torch.equal(continued, model.generate(**whole, **GREEDY))
            return
    as_run = make_method(method, keep=0.4, **METHOD_PARAMETERS[method])
    given, positions = language_model_inputs(model, first), default_positions(model, as_run)
    if replaces_values(method):
        given = given_as_entered(model, given, entered[0], first, run)
    for row in range(len(rows)):
        new = continued[row, first["input_ids"].shape[1] :]
        check_greedy(model, first, run, row, positions, new, given, first=7)


@over_video_matrix
def test_a_video_in_each_of_two_turns(method, case):
    """The second video goes behind the kept tokens of the first, and is cut as it is in one prompt with it."""
    model, turns = case.build(torch.float32), [case.inputs([[3, "video", 4]]), case.inputs([[2, "video B", 5]])]
    with torch.no_grad(), pruned(model, method, 0.4):
        answer = model.generate(**turns[0], **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([answer.sequences, turns[1]["input_ids"]], 1)
        types = {"mm_token_type_ids": case.types(ids)} if isinstance(case, QwenCase) else {}
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}
        shown = {key: torch.cat([turn[key] for turn in turns]) for key in turns[0] if key not in PROMPT}
        if types:
            # The host makes positions from the grids of the whole prompt, but encodes only what it has grids and pixels of.
            types["position_ids"] = case.positions(model, {**shown, **text})
        second = {key: value for key, value in turns[1].items() if key not in PROMPT}
        go_on = {**second, **text, **types, **GREEDY, "past_key_values": answer.past_key_values}
        if method in BY_ALL_TOKENS_OF_A_CALL:
            with pytest.raises(vlmprune.errors.UnsupportedCallError, match="tokens of earlier turns"):
                model.generate(**go_on)
            return
        continued = model.generate(**go_on)
        later = vlmprune.last_run(model).videos
        from_scratch = model.generate(**shown, **text, **GREEDY)
        both = vlmprune.last_run(model).videos
    assert [len(later), len(both)] == [1, 2]
    if method not in FOLLOW_THE_QUESTION:
        assert torch.equal(continued, from_scratch)
        assert torch.equal(later[0].kept, both[1].kept)


def served_alone(method, row):
    """Whether a method serves a row without its neighbours: those for videos refuse images alone."""
    names = [item for item in row if isinstance(item, str)]
    parts = make_method(method, **METHOD_PARAMETERS[method]).parts()
    return (
        not names
        or any("video" in name for name in names)
        or not any(need.name == "videos" for part in parts for need in part.needs)
    )
