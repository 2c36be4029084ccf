"""A pruned cache that is cropped stands for the tokens that the caller left in it, in every layer and row."""

import pytest
import torch
from transformers import DynamicCache

import vlmprune
from support.caches import cache_lengths, layer_keys, rounded_cache
from support.family_cases import FAMILY_CASES
from support.host_parts import decoder
from support.layerwise import default_positions, language_model_inputs, placeholders, row_by_layers
from support.matrix import FOLLOW_THE_QUESTION, MERGE_BEFORE, METHOD_PARAMETERS, croppable, over_matrix, over_sites
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.registry import get_method

ROWS = [[3, "A", 6], [2, "B", 7]]
QUESTION = torch.tensor([[21, 22, 23, 24, 25]])


def ask(model, given, cache, length, mask=None):
    """Logits of the question after `length` tokens of the prompt, at the positions that follow the highest of each row."""
    rows = layer_keys(cache)[0].shape[0]
    ids = given["position_ids"]
    if ids is None:
        ids = torch.arange(length)[None, None].expand(1, rows, -1)
    elif ids.ndim == 2:
        ids = ids[None].expand(-1, rows, -1)
    valid = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask[:, :length].bool()
    start = ids[-3:, :, :length].amax(0).masked_fill(~valid, -1).amax(-1)
    positions = start[:, None] + 1 + torch.arange(QUESTION.shape[1])
    if ids.shape[0] > 1:
        positions = positions[None].expand(3, -1, -1)
    tail = torch.ones(rows, QUESTION.shape[1], dtype=torch.long)
    return model(
        input_ids=QUESTION.expand(rows, -1),
        position_ids=positions,
        attention_mask=None if mask is None else torch.cat([mask[:, :length], tail], 1),
        past_key_values=cache,
    ).logits


def cut_off(model, inputs, record, length):
    """The batch of one row and its record as if the prompt ended after `length` tokens."""
    visual = int(placeholders(model, inputs["input_ids"][:, :length]).sum())
    images = []
    for image in record.images:
        stages = [(layer, kept[kept < visual]) for layer, kept in image.stages]
        images.append(type(image)(**{**vars(image), "stages": stages, "kept": image.kept[image.kept < visual]}))
        visual = max(0, visual - image.total)
    shorter = {key: inputs[key][:, :length] for key in ("input_ids", "attention_mask")}
    return shorter, type("Record", (), {"images": images, "method": record.method})


def by_hand(model, method, inputs, given, record, length):
    """Logits of the question over the unpatched layers, on the kept tokens before column `length`."""
    shorter, record = cut_off(model, inputs, record, length)
    given = dict(given, inputs_embeds=given["inputs_embeds"][:, :length])
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"][..., :length]
    positions = default_positions(model, method)
    return row_by_layers(model, shorter, record, 0, positions, QUESTION[0], given).logits[-QUESTION.shape[1] :]


# States of linear attention and full windows give no tokens back: hosts refuse to crop them, and so do pruned caches.
CROPPABLE = [case for case in over_sites.args[1] if croppable(case.values[1])]
over_croppable = pytest.mark.parametrize(("method", "family"), CROPPABLE)

# A merged token stands for several, so by hand it cannot be cut in two.
SELECTING = [
    case
    for case in over_matrix.args[1]
    if not get_method(case.values[0]).merges and case.values[0] not in MERGE_BEFORE and croppable(case.values[1])
]


@pytest.mark.parametrize("family", [case for case in FAMILY_CASES if not croppable(case)], ids=repr)
def test_states_and_full_windows_are_not_cropped(family):
    model = family.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=0.3):
        cache = model(**family.inputs([ROWS[0]]), use_cache=True).past_key_values
        before = cache_lengths(cache)
        with pytest.raises(UnsupportedCallError, match=r"LinearAttentionLayer|windows"):
            cache.crop(-2)
    assert cache_lengths(cache) == before


@pytest.mark.parametrize(("method", "family"), SELECTING)
@pytest.mark.parametrize("left", ["text", "image"])
def test_cropped_cache_equals_the_layers_by_hand(method, family, left):
    model = family.build(torch.float32)
    inputs = family.inputs([ROWS[0]])
    total = inputs["input_ids"].shape[1]
    length = total - 4 if left == "text" else 3 + family.tokens("A") // 2
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        cache = model(**inputs, use_cache=True).past_key_values
        record = vlmprune.last_run(model)
    given = language_model_inputs(model, inputs)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        before = cache_lengths(cache)
        cache.crop(length - total)
        assert cache.get_seq_length() == length
        assert all(now < then for now, then in zip(cache_lengths(cache), before, strict=True))
        logits = ask(model, given, cache, length)
    wanted = by_hand(model, method, inputs, given, record, length)
    torch.testing.assert_close(logits[0], wanted, atol=5e-5, rtol=1e-4)


@over_croppable
def test_rows_are_cropped_each_for_itself(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    mask, total = inputs["attention_mask"], inputs["input_ids"].shape[1]
    given = language_model_inputs(model, inputs)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        for length in (total - 2, 3 + family.tokens("A") * 2 // 3, 3 + family.tokens("A") // 4):
            cache = model(**inputs, use_cache=True).past_key_values
            cache.crop(length - total)
            together = ask(model, given, cache, length, mask)
            for row, items in enumerate(ROWS):
                single = family.inputs([items])
                gone = total - single["input_ids"].shape[1]
                alone = model(**single, use_cache=True).past_key_values
                alone.crop(length - total)
                logits = ask(model, language_row(given, row, gone), alone, length - gone)
                torch.testing.assert_close(together[row], logits[0], atol=5e-5, rtol=1e-4)


def language_row(given, row, gone):
    ids = given.get("position_ids")
    return {"position_ids": None if ids is None else ids[..., row if ids.shape[-2] > 1 else 0, gone:].unsqueeze(-2)}


@over_croppable
def test_last_question_is_edited(method, family):
    """Every crop length from the last answer token to nothing, then another question by `generate`."""
    model = family.build(torch.float32)
    inputs = family.inputs([ROWS[0]])
    total, greedy = inputs["input_ids"].shape[1], {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        turn = model.generate(**inputs, **greedy, return_dict_in_generate=True)
        cache = turn.past_key_values
        assert cache.get_seq_length() == total + 3
        cache.crop(-2)
        ids = torch.cat([turn.sequences[:, : total + 1], QUESTION], 1)
        mask = torch.ones_like(ids)
        continued = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **greedy)
        whole = model.generate(**family.longer(model, [inputs], ids, mask), **greedy)
        if method not in FOLLOW_THE_QUESTION:
            assert torch.equal(continued, whole)
        cache.crop(-(cache.get_seq_length() - total + 4))
        ids = torch.cat([inputs["input_ids"][:, :-4], QUESTION], 1)
        mask = torch.ones_like(ids)
        continued = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **greedy)
        whole = model.generate(**family.longer(model, [inputs], ids, mask), **greedy)
        if method not in FOLLOW_THE_QUESTION:
            assert torch.equal(continued, whole)


@over_croppable
def test_cropped_to_nothing_is_an_ordinary_cache(method, family):
    model = family.build(torch.float32)
    inputs, text = family.inputs([ROWS[0]]), family.inputs([[6]])
    with torch.no_grad():
        wanted = model(**text).logits
        with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-inputs["input_ids"].shape[1])
        assert type(cache) is DynamicCache
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(**text, past_key_values=cache).logits, wanted)


def test_image_after_a_crop_into_the_image():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    inputs, second = LLAVA_CLIP_GQA.inputs([ROWS[0]]), LLAVA_CLIP_GQA.inputs([["B", 4]])
    length = 3 + 12
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        cache = model(**inputs, use_cache=True).past_key_values
        first = vlmprune.last_run(model).images[0].kept
        cache.crop(length - inputs["input_ids"].shape[1])
        second["attention_mask"] = torch.ones(1, length + second["input_ids"].shape[1])
        logits = model(**second, past_key_values=cache).logits[:, -1]
        kept = vlmprune.last_run(model).images[0].kept
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], second["input_ids"]], 1),
        "pixel_values": torch.cat([inputs["pixel_values"], second["pixel_values"]]),
    }
    embeddings = language_model_inputs(model, whole)["inputs_embeds"]
    prompt = inputs["input_ids"].shape[1]
    columns = torch.cat(
        [torch.arange(3), 3 + first[first < 12], prompt + kept, torch.arange(prompt + 36, prompt + 36 + 4)]
    )
    with torch.no_grad():
        wanted = model.lm_head(decoder(model)(inputs_embeds=embeddings[:, columns]).last_hidden_state)
    torch.testing.assert_close(logits, wanted[:, -1], atol=5e-5, rtol=1e-4)


def test_layers_shortened_one_by_one_are_refused():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        cache = model(**LLAVA_CLIP_GQA.inputs([ROWS[0]]), use_cache=True).past_key_values
        for layer in cache.layers:
            layer.crop(-3)
        with pytest.raises(UnsupportedCallError, match=r"cache\.crop"):
            model(input_ids=QUESTION, past_key_values=cache)


def test_positive_lengths_are_as_in_the_host():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    with torch.no_grad():
        plain = model(**LLAVA_CLIP_GQA.inputs([ROWS[0]]), use_cache=True).past_key_values
        with vlmprune.pruned(model, "divprune", keep=0.3):
            cache = model(**LLAVA_CLIP_GQA.inputs([ROWS[0]]), use_cache=True).past_key_values
    try:
        plain.crop(20)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:30]):
            cache.crop(20)
        return
    cache.crop(20)
    assert cache.get_seq_length() == plain.get_seq_length()


def test_quantised_entries_are_not_cropped():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        cache = rounded_cache(model)
        model(**LLAVA_CLIP_GQA.inputs([ROWS[0]]), past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="RoundedLayer"):
            cache.crop(-2)


def test_rows_of_which_only_padding_is_left_are_repeated_too():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    inputs = LLAVA_CLIP_GQA.inputs([[1, "A", 1], [2, "B", 1, "A", 1]])
    padding = int((inputs["attention_mask"][0] == 0).sum())
    mask = torch.cat([torch.zeros(2, padding), torch.ones(2, QUESTION.shape[1])], 1).long()
    positions = torch.arange(QUESTION.shape[1]).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=QUESTION).logits
        with vlmprune.pruned(model, "uniform", keep=0.4):
            cache = model(**inputs, use_cache=True).past_key_values
            cache.batch_select_indices(torch.tensor([0]))
            cache.crop(padding - cache.get_seq_length())
            assert cache.get_seq_length() == padding
            assert cache_lengths(cache) == [0] * len(cache.layers)
            cache.batch_repeat_interleave(2)
            question = {"input_ids": QUESTION.expand(2, -1), "attention_mask": mask, "position_ids": positions}
            logits = model(**question, past_key_values=cache).logits
    torch.testing.assert_close(logits, expected.expand(2, -1, -1), atol=2e-5, rtol=1e-4)
