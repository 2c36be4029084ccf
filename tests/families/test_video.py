"""Videos: their tokens are selected among like those of images, alone and mixed with images."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families import llava_onevision
from support.families.by_hand import check_pruned, language_model_inputs
from support.families.qwen_case import VIDEO_TOKEN, token_types
from support.matrix import REQUIRED, serves
from support.video_matrix import QWEN_CASES, ROWS
from vlmprune.errors import LayoutError, UnsupportedMethodError
from vlmprune.methods import DivPrune, PyramidDrop, registry
from vlmprune.methods.needs import STILL_IMAGES
from vlmprune.methods.registry import get_method

CASES = (*QWEN_CASES, *llava_onevision.CASES)
METHODS = ("random", "uniform", "divprune", "textmonkey")
SERVING = [name for name, cls in registry.METHODS.items() if STILL_IMAGES not in cls.needs]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_methods = pytest.mark.parametrize("method", METHODS)
over_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def as_served(case, rows):
    """The rows with videos of one length where the host stacks them."""
    if case in QWEN_CASES:
        return rows
    return [
        [item.replace("large", "B").replace("small", "C") if "video" in str(item) else item for item in row]
        for row in rows
    ]


def kept_of(case, name, keep):
    """Tokens that stay: the newline behind a video of OneVision is not counted, and always there."""
    newline = int(case not in QWEN_CASES and "video" in name)
    return round(keep * (case.tokens(name) - newline)) + newline


@over_cases
@over_methods
@over_rows
def test_pruned_call_equals_the_unpatched_language_model_by_hand(case, method, rows):
    rows = as_served(case, rows)
    model, inputs = case.build(torch.float32), case.inputs(rows)
    given = language_model_inputs(model, inputs)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:]
    names = [item for row in rows for item in row if isinstance(item, str)]
    assert [image.total for image in run.images] == [case.tokens(name) for name in names]
    assert [len(image.kept) for image in run.images] == [kept_of(case, name, 0.3) for name in names]
    check_pruned(model, inputs, run, logits, new, given)


@over_cases
@over_methods
def test_keep_everything_is_bit_identical(case, method):
    model, inputs = case.build(torch.float32), case.inputs(as_served(case, ROWS["mixed"]))
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with vlmprune.pruned(model, method, keep=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


@over_cases
@over_methods
@pytest.mark.parametrize("padding", ["left", "right"])
def test_row_in_a_batch_equals_row_alone(case, method, padding):
    model, batch = case.build(torch.float32), case.inputs(as_served(case, ROWS["mixed"]), padding)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3):
        together = model(**batch).logits
        run = vlmprune.last_run(model)
        for row, items in enumerate(as_served(case, ROWS["mixed"])):
            alone = model(**case.inputs([items])).logits[0]
            expected = [image.kept.tolist() for image in vlmprune.last_run(model).images]
            assert [image.kept.tolist() for image in run.images if image.batch_index == row] == expected
            valid = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, valid], alone, atol=2e-5, rtol=1e-4)


@over_cases
@over_methods
def test_beams_and_cache(case, method):
    rows = ROWS["mixed"]
    if case not in QWEN_CASES:
        # The host of OneVision repeats image by image for beams in transformers 5.17, not row by row.
        rows = [[2, "A", 3, "video", 4], [1, "video B", 2, "small", 1], [6], [2, "B", 2]]
    model, inputs = case.build(torch.float32), case.inputs(rows)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3):
        beams = model.generate(**inputs, **greedy, num_beams=3, num_return_sequences=2)
        images = vlmprune.last_run(model).images
        for row, items in enumerate(rows):
            alone = model.generate(**case.inputs([items]), **greedy, num_beams=3, num_return_sequences=2)
            assert beams[2 * row : 2 * row + 2, -5:].tolist() == alone[:, -5:].tolist()
            shown = [
                [image.kept.tolist() for image in images if image.batch_index == 3 * row + beam] for beam in range(3)
            ]
            assert shown[0] == shown[1] == shown[2]
        uncached = model.generate(**inputs, **greedy, use_cache=False)
        assert torch.equal(model.generate(**inputs, **greedy), uncached)


@over_cases
@over_methods
def test_second_turn_continues_the_returned_cache(case, method):
    model, first = case.build(torch.float32), case.inputs([[2, "A", 3, "video", 4], [1, "video B", 2], [6]])
    greedy = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3):
        turn = model.generate(**first, **greedy, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, torch.tensor([[21, 22, 23]] * 3)], 1)
        longer = {"input_ids": ids, "attention_mask": torch.cat([first["attention_mask"], torch.ones(3, 7).long()], 1)}
        if "mm_token_type_ids" in first:
            longer["mm_token_type_ids"] = token_types(ids)
        from_scratch = model.generate(**{**first, **longer}, **greedy)
        continued = model.generate(**longer, past_key_values=turn.past_key_values, **greedy)
    assert torch.equal(continued, from_scratch)


@pytest.mark.parametrize("case", QWEN_CASES, ids=str)
def test_video_in_the_second_turn(case):
    model, greedy = case.build(torch.float32), {"max_new_tokens": 4, "do_sample": False}
    first, second = case.inputs([[3, "A", 4]]), case.inputs([[2, "video", 5]])
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        turn = model.generate(**first, **greedy, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, second["input_ids"]], 1)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": token_types(ids)}
        # The host makes positions from the grids of the whole prompt, but encodes only what it has grids and pixels of.
        positions = case.positions(model, {**first, **second, **text})
        continued = model.generate(
            **{**second, **text}, position_ids=positions, past_key_values=turn.past_key_values, **greedy
        )
        assert [image.modality for image in vlmprune.last_run(model).images] == ["video"]
        assert torch.equal(continued, model.generate(**{**first, **second, **text}, **greedy))


@pytest.mark.parametrize("case", QWEN_CASES, ids=str)
@over_rows
def test_compact_positions_close_the_gaps_of_frames(case, rows):
    model, inputs = case.build(torch.float32), case.inputs(rows)
    given = language_model_inputs(model, inputs)
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=5, positions="compact"):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
    check_pruned(model, inputs, run, logits, new, given, compact=True)


@over_cases
@over_methods
def test_dtype_and_backends(case, method):
    for implementation in ("eager", "sdpa"):
        model, inputs = case.build(torch.bfloat16), case.inputs(as_served(case, ROWS["mixed"]), dtype=torch.bfloat16)
        previous = model.config._attn_implementation
        model.set_attn_implementation(implementation)
        try:
            with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3):
                assert model(**inputs).logits.isfinite().all()
        finally:
            model.set_attn_implementation(previous)


@pytest.mark.parametrize("case", QWEN_CASES, ids=str)
def test_record_says_what_was_kept_of_each_video(case):
    model, inputs = case.build(torch.float32), case.inputs(ROWS["mixed"])
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=0.25):
        model(**inputs)
        run = vlmprune.last_run(model)
    kinds = [(image.batch_index, image.modality, image.grid, len(image.kept_by_frame)) for image in run.images]
    assert kinds == [
        (0, "image", (6, 6), 1),
        (0, "video", None, 3),
        (1, "video", None, 2),
        (1, "image", (4, 4), 1),
        (1, "video", None, 4),
        (1, "image", (6, 8), 1),
        (3, "image", (6, 6), 1),
    ]
    assert [video.total for video in run.videos] == [48, 32, 96]
    assert [[len(frame) for frame in video.kept_by_frame] for video in run.videos] == [[4] * 3, [4] * 2, [6] * 4]
    assert all(frame.max() < 24 for video in run.videos for frame in video.kept_by_frame)
    assert run.text_tokens[2] == 6


def test_record_of_videos_with_a_newline():
    (case,) = llava_onevision.CASES
    model, inputs = case.build(torch.float32), case.inputs([[2, "A", 3, "video", 4]])
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=27):
        model(**inputs)
        (video,) = vlmprune.last_run(model).videos
        assert (video.total, video.batch_index) == (28, 0)
        assert [len(frame) for frame in video.kept_by_frame] == [9] * 3
        assert video.kept_per_frame == [9] * 3
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=5):
        model(**inputs)
        (video,) = vlmprune.last_run(model).videos
        assert [frame.tolist() for frame in video.kept_by_frame] == [[3, 5], [4], [3, 5]]
        assert video.kept_per_frame == [2, 1, 2]
        assert video.kept[-1] == video.total - 1


@over_cases
def test_methods_that_do_not_serve_videos_say_so(case):
    case = deeper(case)
    model = case.build(torch.float32)
    images, videos = case.inputs([[3, "A", 4]]), case.inputs([[3, "A", 2, "video", 4]])
    others = [name for name in vlmprune.list_methods(model) if name not in (*SERVING, "var") and serves(name, case)]
    # A decoder with linear attention is not cut between its layers.
    layer_methods = {"pyramiddrop", "sparsevlm", "visiondrop"} if serves("pyramiddrop", case) else set()
    assert layer_methods <= set(others)
    assert others
    methods = [get_method(name)(keep=0.8, **REQUIRED.get(name, {})) for name in others]
    pipelines = [[DivPrune(keep=0.5), PyramidDrop(keep=0.8)]] if layer_methods else []
    for method in (*methods, *pipelines):
        with torch.no_grad(), vlmprune.pruned(model, method):
            model(**images)
            with pytest.raises(UnsupportedMethodError, match=r"does not serve videos.* random, uniform,.* divprune"):
                model(**videos)
            with pytest.raises(UnsupportedMethodError, match="does not serve videos"):
                model.generate(**videos, max_new_tokens=2)
            model(**images)


@over_cases
def test_videos_that_do_not_fit_their_rows_are_refused(case):
    model, inputs = case.build(torch.float32), case.inputs([[2, "video", 2], [2, "video", 2]])
    ids = inputs["input_ids"].clone()
    first = (ids[0] == VIDEO_TOKEN).nonzero().flatten()
    ids[0, first[-1]] = 5
    ids[1, -1] = VIDEO_TOKEN
    with (
        torch.no_grad(),
        vlmprune.pruned(model, "uniform", keep=0.3),
        pytest.raises(LayoutError, match="features of video 0 do not fit the placeholders of row 0"),
    ):
        model(**{**inputs, "input_ids": ids})


@over_cases
def test_whole_videos_are_served_by_every_method(case):
    case = deeper(case)
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 2, "video", 4]])
    with torch.no_grad():
        expected = model(**inputs).logits
        for name in vlmprune.list_methods(model):
            if get_method(name).site == "attention":
                continue
            with vlmprune.pruned(model, name, keep=1.0, **REQUIRED.get(name, {})):
                assert torch.equal(model(**inputs).logits, expected)
