"""Contract 7: the KV cache shrinks and stays usable."""

import copy

import pytest
import torch

import vlmprune
from support.caches import cache_lengths, wanted_lengths
from support.layerwise import check_greedy, default_positions, language_model_inputs
from support.matrix import BY_ALL_TOKENS_OF_A_CALL, FOLLOW_THE_QUESTION, MERGE_BEFORE, METHOD_PARAMETERS, over_matrix
from support.merging import COMBINED, entering, given_as_entered, given_merged
from support.oracle import suppressed


@over_matrix
def test_cache_holds_only_what_was_kept(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4], [2, "B", 6]])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        cache = model(**inputs, use_cache=True).past_key_values
        run = vlmprune.last_run(model)
    longest = [
        max(visual + run.text_tokens[row] for row, visual in enumerate(layer))
        for layer in zip(*run.visual_tokens_per_layer, strict=True)
    ]
    trimmed = default_positions(model, method).trimmed
    if trimmed is not None:
        longest[trimmed:] = longest[-1:] * (len(longest) - trimmed)
    assert cache_lengths(cache) == wanted_lengths(cache, longest)
    assert longest[-1] < inputs["input_ids"].shape[1]


@over_matrix
@pytest.mark.parametrize("rows", [[[3, "A", 4]], [[3, "A", 4], [2, "B", 1, "C", 6], [9]]], ids=["single", "padded"])
def test_second_turn_continues_the_returned_cache(method, family, rows):
    model = family.build(torch.float32)
    first = family.inputs(rows)
    question = torch.tensor([[21, 22, 23]]).expand(len(rows), -1)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    pruned = vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method])
    with torch.no_grad(), pruned, entering(model) as entered:
        turn = model.generate(**first, **greedy, return_dict_in_generate=True)
        run = vlmprune.last_run(model)
        ids = torch.cat([turn.sequences, question], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(len(rows), 7, dtype=torch.long)], 1)
        whole = family.longer(model, [first], ids, mask)
        from_scratch = model.generate(**whole, **greedy)
        continued = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=copy.deepcopy(turn.past_key_values), **greedy
        )
        by_hand = model(
            input_ids=ids[:, -4:],
            attention_mask=mask,
            position_ids=family.positions(model, whole)[..., -4:],
            past_key_values=turn.past_key_values,
        ).logits[:, -1]
    assert torch.equal(suppressed(by_hand).argmax(-1), continued[:, ids.shape[1]])
    if method not in FOLLOW_THE_QUESTION:
        assert torch.equal(continued, from_scratch)
        return
    given = language_model_inputs(model, first)
    if method in COMBINED:
        given = given_merged(given, first, run, model.config.image_token_id)
    elif method in MERGE_BEFORE:
        given = given_as_entered(model, given, entered[0], first, run)
    for row in range(len(rows)):
        new = continued[row, first["input_ids"].shape[1] :]
        check_greedy(model, first, run, row, default_positions(model, method), new, given, first=7)


@over_matrix
def test_image_in_the_second_turn(method, family):
    model = family.build(torch.float32)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    turns = [[[3, "A", 4], [2, "B", 9]], [[2, "C", 5], [2, "D", 5]]]

    def converse(rows):
        first, second = (family.inputs([turn[row] for row in rows]) for turn in turns)
        answer = model.generate(**first, **greedy, return_dict_in_generate=True)
        ids = torch.cat([answer.sequences, second["input_ids"]], 1)
        tail = torch.ones(len(rows), ids.shape[1] - first["attention_mask"].shape[1], dtype=torch.long)
        mask = torch.cat([first["attention_mask"], tail], 1)
        inputs = family.longer(model, [first, second], ids, mask)
        return ids, mask, model.generate(**inputs, past_key_values=answer.past_key_values, **greedy)

    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        if method in BY_ALL_TOKENS_OF_A_CALL:
            with pytest.raises(vlmprune.errors.UnsupportedCallError, match="tokens of earlier turns"):
                converse([0, 1])
            return
        ids, mask, continued = converse([0, 1])
        for row in range(2):
            assert torch.equal(converse([row])[2][0, -4:], continued[row, -4:])
        if method in FOLLOW_THE_QUESTION:
            return
        both = family.inputs([[3, "A", 4, 4, 2, "C", 5], [2, "B", 9, 4, 2, "D", 5]])
        from_scratch = model.generate(**family.longer(model, [both], ids, mask), **greedy)
    assert torch.equal(continued, from_scratch)


@over_matrix
def test_text_first_then_image(method, family):
    model = family.build(torch.float32)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        first = family.inputs([[5], [8]])
        turn = model.generate(**first, **greedy, return_dict_in_generate=True)
        second = family.inputs([[2, "C", 5], [2, "D", 5]])
        ids = torch.cat([turn.sequences, second["input_ids"]], 1)
        tail = torch.ones(2, ids.shape[1] - first["attention_mask"].shape[1], dtype=torch.long)
        mask = torch.cat([first["attention_mask"], tail], 1)
        inputs = family.longer(model, [first, second], ids, mask)
        if method in BY_ALL_TOKENS_OF_A_CALL:
            with pytest.raises(vlmprune.errors.UnsupportedCallError, match="tokens of earlier turns"):
                model.generate(**inputs, past_key_values=turn.past_key_values, **greedy)
            return
        continued = model.generate(**inputs, past_key_values=turn.past_key_values, **greedy)
        from_scratch = model.generate(**inputs, **greedy)
    assert torch.equal(continued, from_scratch)


@over_matrix
def test_wrong_mask_for_a_pruned_cache_is_refused(method, family):
    model = family.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        cache = model(**family.inputs([[3, "A", 4]]), use_cache=True).past_key_values
        with pytest.raises(vlmprune.errors.UnsupportedCallError, match="are needed"):
            model(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, 6), past_key_values=cache)
        with pytest.raises(vlmprune.errors.UnsupportedCallError, match="rows"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
