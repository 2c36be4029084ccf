"""Methods that change attention: as whole eager maps say, in prefill and every step, whatever the backend, batch and cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

import vlmprune
from support.deeper import deeper
from support.family_cases import FAMILY_CASES
from support.layerwise import placeholders
from support.matrix import serves
from support.plain_methods.var import plain_var
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import ParameterError, UnsupportedCallError, UnsupportedMethodError

# Hidden states of the tiny models are too narrow for the published threshold.
VAR = {"tau": 1.7, "highest_share": 0.8, "lowest_weight": 0.2, "move_fraction": 0.7}
PLAIN = {"tau": 1.7, "share": 0.8, "weight": 0.2, "moved": 0.7, "first_layer": 2}
ROWS = [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]]
STEPS = 4
CASE = deeper(LLAVA_CLIP_GQA, 4)


def generated(model, inputs, **options):
    output = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return output.sequences[:, -STEPS:], torch.stack(output.logits, dim=1)


@torch.no_grad()
def by_maps(model, case, row, new):
    """Logits of the last prompt token and of `new`, from whole maps of the row alone, and what was changed."""
    inputs = case.inputs([row])
    visual = placeholders(model, inputs["input_ids"])[0]
    prompt = len(visual)
    later = torch.ones(1, len(new) - 1, dtype=torch.int64)
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], new[None, :-1]], 1)}
    for name, values in inputs.items():
        if name != "input_ids" and values.shape[:2] == (1, prompt):
            longer[name] = torch.cat([values, later.to(values) * (name == "attention_mask")], 1)
    if not visual.any():
        return model(**longer, use_cache=False).logits[0, prompt - 1 :], {}
    with plain_var(model, visual, prompt, **PLAIN) as counts:
        return model(**longer, use_cache=False).logits[0, prompt - 1 :], counts


@pytest.mark.parametrize("family", [case for case in FAMILY_CASES if serves("var", case)], ids=str)
def test_prefill_and_steps_are_those_of_eager_maps(family):
    case = deeper(family, 4)
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, "var", **VAR):
        new, logits = generated(model, inputs)
        alone = [generated(model, case.inputs([row])) for row in ROWS[:2]]
    changed = 0
    for row, own in enumerate(ROWS):
        expected, counts = by_maps(model, case, own, new[row])
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-3)
        changed += counts.get("rows", 0)
    for row, (tokens, steps) in enumerate(alone):
        assert torch.equal(tokens[0], new[row])
        torch.testing.assert_close(steps[0], logits[row], atol=2e-5, rtol=1e-4)
    assert changed


def test_one_forward_without_a_cache_is_that_of_eager_maps():
    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, "var", **VAR):
        logits = model(**inputs, use_cache=False).logits
        cached = model(**inputs).logits
    torch.testing.assert_close(cached, logits, atol=2e-5, rtol=1e-4)
    for row, own in enumerate(ROWS):
        last = inputs["attention_mask"][row].nonzero()[-1, 0]
        expected, _ = by_maps(model, CASE, own, torch.tensor([3]))
        torch.testing.assert_close(logits[row, last], expected[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_and_stay(backend, dtype):
    case = CASE
    model, inputs = copy.deepcopy(case.build(dtype)), case.inputs(ROWS[:2], dtype=dtype)
    exact = case.build(torch.float32)
    model.set_attn_implementation({"text_config": backend, "vision_config": "eager"})
    with torch.no_grad(), vlmprune.pruned(model, "var", **VAR), vlmprune.pruned(exact, "var", **VAR):
        logits = model(**inputs).logits
        expected = exact(**case.inputs(ROWS[:2])).logits
        assert model.config.get_text_config()._attn_implementation == backend
    seen = inputs["attention_mask"].bool()
    if dtype == torch.float32:
        torch.testing.assert_close(logits[seen], expected[seen], atol=2e-5, rtol=1e-4)
    else:
        error = (logits[seen].float() - expected[seen]).norm(dim=-1) / expected[seen].norm(dim=-1)
        assert error.median() < 0.05


def test_where_no_head_passes_nothing_changes_to_the_bit():
    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS)
    with torch.no_grad():
        tokens, logits = generated(model, inputs)
        with vlmprune.pruned(model, "var", **{**VAR, "lowest_weight": 1.0}):
            same, equal = generated(model, inputs)
    assert torch.equal(tokens, same)
    assert torch.equal(logits, equal)


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}])
def test_beams_and_static_caches(options):
    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS[:2])
    with torch.no_grad(), vlmprune.pruned(model, "var", **VAR):
        together = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **options)[:, -STEPS:]
        alone = [
            model.generate(**CASE.inputs([row]), max_new_tokens=STEPS, do_sample=False, **options)[:, -STEPS:]
            for row in ROWS[:2]
        ]
        assert torch.equal(together, torch.cat(alone))
        if "num_beams" not in options:
            assert torch.equal(together, generated(model, inputs)[0])


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
def test_drafts_are_lossless(drafts):
    model = CASE.build(torch.float32)
    inputs = CASE.inputs([[4, "A", 5]])
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, :2]
    greedy = {"max_new_tokens": 9, "do_sample": False}
    extra = {"prompt_lookup_num_tokens": 3} if drafts == "lookup" else {"assistant_model": copy.deepcopy(model)}
    with torch.no_grad(), vlmprune.pruned(model, "var", **VAR):
        assert torch.equal(model.generate(**inputs, **greedy, **extra), model.generate(**inputs, **greedy))


def prefilled(model, inputs, cache=None):
    output = model(**inputs, past_key_values=cache or DynamicCache(), use_cache=True)
    return output.past_key_values, output.logits


def step(model, cache, ids, mask):
    length = cache.get_seq_length()
    positions = (mask.cumsum(1) - 1)[:, length:]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def test_the_cache_knows_sinks_through_every_change_of_its_rows():
    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS[:2])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.int64)], 1)
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.no_grad(), vlmprune.pruned(model, "var", **VAR):
        expected = step(model, prefilled(model, inputs)[0], ids, mask)
        turned = prefilled(model, inputs)[0]
        turned.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(step(model, turned, ids.flip(0), mask.flip(0)), expected.flip(0))
        copied = copy.deepcopy(prefilled(model, inputs)[0])
        torch.testing.assert_close(step(model, copied, ids, mask), expected)
        chosen = prefilled(model, inputs)[0]
        chosen.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(step(model, chosen, ids[1:], mask[1:]), expected[1:], atol=2e-5, rtol=1e-4)
        repeated = prefilled(model, inputs)[0]
        repeated.batch_repeat_interleave(2)
        many = [values.repeat_interleave(2, dim=0) for values in (ids, mask)]
        torch.testing.assert_close(step(model, repeated, *many)[::2], expected, atol=2e-5, rtol=1e-4)
        cropped = prefilled(model, inputs)[0]
        step(model, cropped, ids + 3, mask)
        cropped.crop(-2)
        torch.testing.assert_close(step(model, cropped, ids, mask), expected)
        plain = step(model, prefilled(model, inputs)[0], ids, mask)
    with torch.no_grad():
        unchanged = step(model, prefilled(model, inputs)[0], ids, mask)
    assert not torch.allclose(plain, unchanged, atol=1e-4)


def test_an_image_in_the_second_turn():
    """Two turns on one cache give what the whole conversation gives, but for sinks that the first turn could not see."""
    case, model = CASE, CASE.build(torch.float32)
    whole = case.inputs([[3, "A", 4, "B", 2]])
    cut = 3 + case.tokens("A") + 4
    first = {**case.inputs([[3, "A", 4]]), "input_ids": whole["input_ids"][:, :cut]}
    second = {
        **case.inputs([["B", 2]]),
        "input_ids": whole["input_ids"][:, cut:],
        "attention_mask": whole["attention_mask"],
    }
    with torch.no_grad(), vlmprune.pruned(model, "var", **VAR):
        together = model(**whole).logits[:, cut:]
        cache, _ = prefilled(model, first)
        later = step_with_images(model, cache, second)
    torch.testing.assert_close(later, together, atol=2e-5, rtol=1e-4)


def step_with_images(model, cache, inputs):
    return model(**inputs, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("other", ["divprune", "fastv", "pyramiddrop"])
def test_with_a_method_that_drops_tokens(other):
    """A padded batch gives what its rows give alone, in every step; and something changes beside the dropping."""
    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS)
    method = [vlmprune.methods.registry.make_method(other, keep=0.6), vlmprune.methods.VAR(**VAR)]
    with torch.no_grad():
        with vlmprune.pruned(model, method):
            new, logits = generated(model, inputs)
            alone = [generated(model, CASE.inputs([row])) for row in ROWS]
            uncached = model(**inputs, use_cache=False).logits
            last = inputs["attention_mask"].shape[1] - 1
            torch.testing.assert_close(uncached[:, last], logits[:, 0], atol=2e-5, rtol=1e-4)
        with vlmprune.pruned(model, method[:1]):
            _, dropped = generated(model, inputs)
    for row, (tokens, steps) in enumerate(alone):
        assert torch.equal(tokens[0], new[row])
        torch.testing.assert_close(steps[0], logits[row], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(dropped[0], logits[0], atol=1e-4)


def test_dropping_what_is_dropped_by_hand_gives_the_same():
    """With the kept tokens given by hand and nothing dropped, sinks and rows are those of the shorter prompt."""
    model, inputs = CASE.build(torch.float32), CASE.inputs([[3, "A", 4]])
    with torch.no_grad():
        with vlmprune.pruned(model, [vlmprune.methods.DivPrune(keep=0.6), vlmprune.methods.VAR(**VAR)]):
            logits = model(**inputs).logits[0, -1]
            kept = vlmprune.last_run(model).images[0].kept
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        shorter = torch.cat([embeddings[0, :3], features[kept], embeddings[0, -4:]])[None]
        mask = torch.zeros(1, shorter.shape[1], dtype=torch.bool)
        mask[0, 3 : 3 + len(kept)] = True
        with plain_var(model, mask[0], shorter.shape[1], **PLAIN) as counts:
            expected = model(inputs_embeds=shorter, use_cache=False).logits[0, -1]
    assert counts["rows"]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_undo_is_exact_and_the_cache_is_no_one_elses():
    from contracts.test_undo import fingerprint

    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS[:1])
    ids, mask = torch.tensor([[5]]), torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        logits, before = model(**inputs).logits, fingerprint(model)
        with vlmprune.pruned(model, "var", **VAR):
            changed = model(**inputs).logits
            cache, _ = prefilled(model, inputs)
            run = vlmprune.last_run(model)
        assert not torch.equal(changed, logits)
        assert fingerprint(model) == before
        assert torch.equal(model(**inputs).logits, logits)
        with pytest.raises(UnsupportedCallError, match="pruned by 'var'"):
            step(model, cache, ids, mask)
        with vlmprune.pruned(model, "fastv", keep=0.6), pytest.raises(UnsupportedCallError, match="made by 'var'"):
            step(model, cache, ids, mask)
    assert run.method == "var"
    assert run.signal == "spikes of hidden states layers 2 to 3"
    assert [image.kept.tolist() for image in run.images] == [list(range(CASE.tokens("A")))]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0.5}, r"keep=0.5: 'var' changes attention and drops no visual tokens"),
        ({"tau": 20.0}, r"tau=20 cannot be exceeded by hidden states of \d+ channels"),
        ({"tau": 2.0, "first_layer": 4}, r"first_layer=4 leaves none of 4 layers to change; nearest: first_layer=3"),
        ({"tau": 2.0, "dimensions": (3, -1)}, "dimensions="),
        ({"tau": 2.0, "move_fraction": 0.0}, "move_fraction=0.0"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_forward(parameters, message):
    model = CASE.build(torch.float32)
    with pytest.raises(ParameterError, match=message):
        vlmprune.apply(model, "var", **parameters)
    assert not model.model._forward_pre_hooks
    assert "_vlmprune" not in model.__dict__


def test_symbols_of_the_paper_are_answered():
    with pytest.raises(Exception, match="move_fraction=1 - p"):
        vlmprune.methods.VAR(p=0.6)
    with pytest.raises(Exception, match="llama-2-7b"):
        vlmprune.methods.VAR(dimensions="llama-2-70b")
    assert vlmprune.methods.VAR(dimensions="llama-2-7b").dimensions == (1415, 2533)


def test_what_cannot_be_served_in_a_call_is_refused():
    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS[:1])
    narrow = vlmprune.methods.VAR(**VAR, dimensions=(4096,))
    with torch.no_grad(), vlmprune.pruned(model, narrow), pytest.raises(ParameterError, match="the hidden state has"):
        model(**inputs)
    with pytest.raises(UnsupportedMethodError, match="both act at the attention site"):
        vlmprune.apply(model, [vlmprune.methods.VAR(**VAR), vlmprune.methods.VAR(tau=2.0)])
