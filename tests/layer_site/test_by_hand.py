"""Staged dropping equals the unpatched layers run by hand, in prefill, decode and later turns."""

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA, DEEP_LLAVA_QWEN, alive_columns, cache_lengths, row_by_hand

import vlmprune
from support.oracle import suppressed
from vlmprune.methods import DivPrune, FastV, Pool, PyramidDrop, ToDRE, ToDRERelevance

PYRAMID = PyramidDrop(layers=(2, 4, 6), ratios=(0.5, 0.25, 0.125))
METHODS = {
    "pyramiddrop": PYRAMID,
    "pyramiddrop-keep": PyramidDrop(keep=0.4),
    "pyramiddrop-count": PyramidDrop(keep=12),
    "fastv": FastV(layer=2, ratio=0.6),
    "todre_relevance": ToDRERelevance(tau=1.0, layer=3),
    "pipeline": [DivPrune(keep=0.5), PYRAMID],
    "pipeline-fastv": [DivPrune(keep=0.5), FastV(layer=1, ratio=0.5)],
    "todre": ToDRE(keep=0.5, tau=1.0, layer=3),
}
# Methods whose positions keep gaps of what they drop inside the language model.
GAPS = {"fastv", "todre_relevance", "pipeline-fastv", "todre"}
ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9], [5, "D", 2]]

over_methods = pytest.mark.parametrize("name", METHODS)
over_families = pytest.mark.parametrize("family", [DEEP_LLAVA, DEEP_LLAVA_QWEN], ids=repr)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


@over_families
@over_methods
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prefill(name, family, padding):
    model, inputs = family.build(torch.float32), family.inputs(ROWS, padding)
    with torch.no_grad(), vlmprune.pruned(model, METHODS[name]):
        output = model(**inputs)
        run = vlmprune.last_run(model)
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    for row in range(len(ROWS)):
        columns = alive_columns(inputs, run, row, 7)
        close(output.logits[row, columns], row_by_hand(model, inputs, run, row, name not in GAPS))


@over_families
@over_methods
def test_rows_of_a_batch_are_what_they_are_alone(name, family):
    model = family.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, METHODS[name]):
        for padding in ("left", "right"):
            batch = family.inputs(ROWS, padding)
            together = model(**batch)
            run = vlmprune.last_run(model)
            for row, prompt in enumerate(ROWS):
                alone = model(**family.inputs([prompt])).logits[0, -1]
                single = vlmprune.last_run(model)
                last = batch["attention_mask"][row].nonzero().max()
                close(together.logits[row, last], alone)
                assert run.visual_tokens_per_layer[row] == single.visual_tokens_per_layer[0]
                assert run.text_tokens[row] == single.text_tokens[0]
                kept = [image.kept.tolist() for image in run.images if image.batch_index == row]
                assert kept == [image.kept.tolist() for image in single.images]


@over_methods
def test_generate_and_cache_lengths(name):
    family, model = DEEP_LLAVA, DEEP_LLAVA.build(torch.float32)
    for rows in (ROWS[:1], ROWS):
        inputs = family.inputs(rows)
        with torch.no_grad(), vlmprune.pruned(model, METHODS[name]):
            turn = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
            run = vlmprune.last_run(model)
        longest = [
            max(run.text_tokens[row] + run.visual_tokens_per_layer[row][layer] for row in range(len(rows)))
            for layer in range(8)
        ]
        if len(rows) == 1 or name in ("pipeline", "pipeline-fastv", "todre"):
            assert cache_lengths(turn.past_key_values) == [length + 4 for length in longest]
        assert cache_lengths(turn.past_key_values)[7] == longest[7] + 4
        for row in range(len(rows)):
            new = turn.sequences[row, -5:]
            logits = row_by_hand(model, inputs, run, row, name not in GAPS, later=new[:-1])[-5:]
            assert suppressed(logits).argmax(-1).tolist() == new.tolist()


@over_methods
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["single", "padded"])
def test_second_turn_continues_the_returned_cache(name, rows):
    family, model = DEEP_LLAVA, DEEP_LLAVA.build(torch.float32)
    inputs = family.inputs(rows)
    question = torch.tensor([[21, 22, 23]]).expand(len(rows), -1)
    greedy = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad(), vlmprune.pruned(model, METHODS[name]):
        turn = model.generate(**inputs, **greedy)
        run = vlmprune.last_run(model)
        ids = torch.cat([turn.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 6, dtype=torch.long)], 1)
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=turn.past_key_values, **greedy)
    for row in range(len(rows)):
        later = second.sequences[row, inputs["input_ids"].shape[1] : -1]
        logits = row_by_hand(model, inputs, run, row, name not in GAPS, later=later)[-3:]
        assert suppressed(logits).argmax(-1).tolist() == second.sequences[row, -3:].tolist()


@pytest.mark.parametrize("name", ["pyramiddrop", "fastv", "pipeline"])
def test_image_in_the_second_turn(name):
    """Every row goes on as it does alone, and the caches grow by what each layer sees of the second image."""
    family, model = DEEP_LLAVA, DEEP_LLAVA.build(torch.float32)
    greedy = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}

    def converse(first_rows, second_rows):
        first, second = family.inputs(first_rows), family.inputs(second_rows)
        turn = model.generate(**first, **greedy)
        before = cache_lengths(turn.past_key_values)
        ids = torch.cat([turn.sequences, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(len(ids), 3), second["attention_mask"]], 1).long()
        result = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=turn.past_key_values,
            pixel_values=second["pixel_values"],
            **greedy,
        )
        return result.sequences[:, -3:].tolist(), before, cache_lengths(result.past_key_values)

    firsts, seconds = [[3, "A", 4], [2, "B", 9]], [[2, "C", 5], [2, "D", 5]]
    with torch.no_grad(), vlmprune.pruned(model, METHODS[name]):
        together, _, _ = converse(firsts, seconds)
        run = vlmprune.last_run(model)
        for row in range(2):
            alone, before, after = converse(firsts[row : row + 1], seconds[row : row + 1])
            assert alone == [together[row]]
            grown = [new - old for old, new in zip(before, after, strict=True)]
            seen = vlmprune.last_run(model).visual_tokens_per_layer[0]
            # One token of the first answer was not in the cache yet, the last one of the second is not.
            assert grown == [1 + 7 + tokens + 2 for tokens in seen]
            assert seen == run.visual_tokens_per_layer[row]


def test_merging_before_and_dropping_inside():
    family, model = DEEP_LLAVA, DEEP_LLAVA.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, [Pool(keep=0.5), PYRAMID]):
        together = model(**family.inputs(ROWS, "right"))
        run = vlmprune.last_run(model)
        alone = model(**family.inputs(ROWS[:1])).logits[0, -1]
    assert run.method == "pool+pyramiddrop"
    close(together.logits[0, 42], alone)
    entered = run.visual_tokens_per_layer[0][0]
    assert (
        run.visual_tokens_per_layer[0] == [entered] * 2 + [entered // 2] * 2 + [entered // 4] * 2 + [entered // 8] * 2
    )
