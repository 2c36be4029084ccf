"""A pruned cache is never used where nobody knows that it was pruned, and its rows move together with what is known of them."""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache

import vlmprune
from support.caches import rounded_cache
from support.deeper import deeper
from support.host_parts import decoder
from support.matrix import METHOD_PARAMETERS, croppable, over_matrix, over_sites
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedCallError

ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9]]
NEXT = torch.tensor([[21], [22], [23]])
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def repeated(cache):
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(2)
    return copied


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "itself": lambda cache: cache,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "save": saved,
    "repeated": repeated,
    "gathered": lambda cache: type(cache)([(layer.keys, layer.values) for layer in cache.layers]),
}


@pytest.fixture
def model():
    return deeper(LLAVA_CLIP_GQA).build(torch.float32)


def prefilled(model, method="divprune", rows=ROWS[:1], cache=None, **parameters):
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **parameters):
        return model(**LLAVA_CLIP_GQA.inputs(rows), past_key_values=cache, use_cache=True).past_key_values


@over_matrix
def test_unpruned_model_refuses_a_pruned_cache(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS[:1])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        turn = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        wanted = model(input_ids=NEXT[:1], past_key_values=copy.deepcopy(turn.past_key_values)).logits
    cache = turn.past_key_values
    ids = torch.cat([turn.sequences, NEXT[:1]], 1)
    with torch.no_grad():
        with pytest.raises(UnsupportedCallError, match=r"was pruned by '\w+'.*vlmprune.apply"):
            model(input_ids=NEXT[:1], past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match=r"was pruned by '\w+'"):
            model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        with pytest.raises(UnsupportedCallError, match=r"was pruned by '\w+'"):
            decoder(model)(input_ids=NEXT[:1], past_key_values=cache)
        # Nothing was half done: under its method the cache goes on as if nobody had tried.
        with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            assert torch.equal(model(input_ids=NEXT[:1], past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_copies_of_a_pruned_cache_are_refused_too(model, kind, method):
    parameters = {"layer": 1} if method == "fastv" else {}
    cache = COPIES[kind](prefilled(model, method, **parameters))
    assert isinstance(cache, DynamicCache)
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="pruned"):
        model(input_ids=NEXT[:1].expand(len(cache.layers[0].keys), -1), past_key_values=cache)


@pytest.mark.parametrize("kind", ["copy", "deepcopy", "pickle", "save"])
def test_copies_go_on_under_the_method(model, kind):
    cache = prefilled(model)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        wanted = model(input_ids=NEXT[:1], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model(input_ids=NEXT[:1], past_key_values=COPIES[kind](cache)).logits, wanted)


def test_gathered_caches_know_that_they_do_not_know(model):
    cache = COPIES["gathered"](prefilled(model))
    with (
        torch.no_grad(),
        vlmprune.pruned(model, "divprune", keep=0.3),
        pytest.raises(UnsupportedCallError, match="fresh cache"),
    ):
        model(input_ids=NEXT[:1], past_key_values=cache)


def test_language_model_alone_continues_a_pruned_cache(model):
    cache = prefilled(model)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        wanted = model(input_ids=NEXT[:1], past_key_values=copy.deepcopy(cache)).logits
        output = decoder(model)(input_ids=NEXT[:1], past_key_values=cache)
        assert torch.equal(model.lm_head(output.last_hidden_state), wanted)
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="'divprune'"):
        decoder(model)(input_ids=NEXT[:1], past_key_values=cache)


def test_another_model_refuses_a_pruned_cache(model):
    cache = prefilled(model)
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="'divprune'"):
        copy.deepcopy(model)(input_ids=NEXT[:1], past_key_values=cache)


def test_quantised_cache_is_refused_and_continued(model):
    plain, rounded = prefilled(model), prefilled(model, cache=rounded_cache(model))
    with torch.no_grad():
        with pytest.raises(UnsupportedCallError, match="'divprune'"):
            model(input_ids=NEXT[:1], past_key_values=rounded)
        with vlmprune.pruned(model, "divprune", keep=0.3):
            for token in NEXT[None, :, 0].T:
                wanted = model(input_ids=token[None], past_key_values=plain).logits
                assert torch.equal(model(input_ids=token[None], past_key_values=rounded).logits, wanted)


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_image_behind_quantised_entries(model, method):
    """A method before the first layer never reads them; a method in the layers scores with them."""
    parameters = METHOD_PARAMETERS[method]
    caches = [prefilled(model, method, cache=cache, **parameters) for cache in (None, rounded_cache(model))]
    second = LLAVA_CLIP_GQA.inputs([["B", 3]])
    del second["attention_mask"]
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **parameters):
        wanted = model(**second, past_key_values=caches[0]).logits
        if method == "divprune":
            assert torch.equal(model(**second, past_key_values=caches[1]).logits, wanted)
            return
        with pytest.raises(UnsupportedCallError, match="RoundedLayer"):
            model(**second, past_key_values=caches[1])


def test_offloaded_cache_is_refused(model):
    cache = prefilled(model)
    for layer in cache.layers:
        layer.offload()
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="'divprune'"):
        model(input_ids=NEXT[:1], past_key_values=cache)


def test_an_exception_inside_a_forward_leaves_the_cache_guarded(model):
    cache = prefilled(model)

    def explode(*_):
        raise RuntimeError("inside the norm")

    handle = decoder(model).norm.register_forward_pre_hook(explode)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3), pytest.raises(RuntimeError, match="norm"):
        model(input_ids=NEXT[:1], past_key_values=cache)
    handle.remove()
    with torch.no_grad(), pytest.raises(UnsupportedCallError, match="'divprune'"):
        model(input_ids=NEXT[:1], past_key_values=cache)


def test_reset_makes_an_ordinary_cache(model):
    cache = prefilled(model)
    cache.reset()
    assert type(cache) is DynamicCache
    assert not [name for name in vars(cache) if "vlmprune" in name]
    if cache.get_seq_length():
        pytest.skip("this host's `reset` zeroes the entries and leaves them where they are, pruned or not")
    inputs = LLAVA_CLIP_GQA.inputs(ROWS[:1])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, model(**inputs).logits)


def test_what_was_never_pruned_stays_an_ordinary_cache(model):
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=1.0):
        assert type(model(**LLAVA_CLIP_GQA.inputs(ROWS)).past_key_values) is DynamicCache
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.3):
        assert type(model(**LLAVA_CLIP_GQA.inputs([[5]])).past_key_values) is DynamicCache


ROW_CHANGES = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "batch_select_mask": (
        lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])),
        [1, 2],
    ),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@over_sites
@pytest.mark.parametrize("change", ROW_CHANGES)
def test_rows_move_with_what_is_known_of_them(method, family, change):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    act, order = ROW_CHANGES[change]
    start = family.positions(model, inputs)[..., -1:]

    def go_on(cache, rows):
        ids = torch.tensor([[31, 32, 33]]).expand(len(rows), -1)
        mask = torch.cat([inputs["attention_mask"][rows], torch.ones(len(rows), 3, dtype=torch.long)], 1)
        positions = start[..., rows, :] + 1 + torch.arange(3)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits

    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        cache = model(**inputs, use_cache=True).past_key_values
        if not all(hasattr(layer, change.replace("mask", "indices")) for layer in cache.layers):
            with pytest.raises(AttributeError, match=r"LinearAttentionLayer.*batch_"):
                act(cache)
            return
        wanted = go_on(copy.deepcopy(cache), [0, 1, 2])
        act(cache)
        together = go_on(cache, order)
        torch.testing.assert_close(together, wanted[order], atol=1e-5, rtol=1e-4)
        if not croppable(family):
            return
        cache.crop(-6)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] - 3
        torch.testing.assert_close(
            cropped_then(model, inputs, cache, order, start),
            cropped_then(model, inputs, recropped(model, inputs), [0, 1, 2], start)[order],
            atol=1e-5,
            rtol=1e-4,
        )


def recropped(model, inputs):
    cache = model(**inputs, use_cache=True).past_key_values
    cache.crop(-3)
    return cache


def cropped_then(model, inputs, cache, rows, start):
    mask = torch.cat([inputs["attention_mask"][rows, :-3], torch.ones(len(rows), 1, dtype=torch.long)], 1)
    ids = torch.full((len(rows), 1), 41)
    return model(input_ids=ids, attention_mask=mask, position_ids=start[..., rows, :] - 2, past_key_values=cache).logits
