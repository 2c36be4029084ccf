"""Everything `generate` can do, over pruned prompts."""

import pytest
import torch

import vlmprune
from support.matrix import FOLLOW_THE_QUESTION, METHOD_PARAMETERS, over_matrix

ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9]]


@over_matrix
def test_cache_changes_nothing(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        # Without a cache every step is a prefill, whose last token is another one.
        steps = 1 if method in FOLLOW_THE_QUESTION else 6
        cached = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
        uncached = model.generate(**inputs, max_new_tokens=steps, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


@over_matrix
def test_beams_and_return_sequences(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        together = model.generate(**inputs, **beams)
        images = vlmprune.last_run(model).images
        assert [image.batch_index for image in images] == [0, 1, 2, 3, 3, 4, 4, 5, 5]
        assert images[0].kept.tolist() == images[1].kept.tolist()
        for row, items in enumerate(ROWS):
            alone = model.generate(**family.inputs([items]), **beams)
            assert together[2 * row : 2 * row + 2, -5:].tolist() == alone[:, -5:].tolist()


@over_matrix
def test_sampling_is_reproducible_and_follows_the_seed(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model.generate(**inputs, max_new_tokens=8, do_sample=True, num_return_sequences=2))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@over_matrix
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_on_both_backends(method, family, implementation, dtype):
    model = family.build(dtype)
    previous = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    inputs = family.inputs(ROWS, dtype=dtype)
    try:
        with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            output = model(**inputs)
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert output.logits.dtype == dtype
        assert output.logits.isfinite().all()
        assert tokens.shape == (3, inputs["input_ids"].shape[1] + 4)
        assert model.config._attn_implementation == implementation
    finally:
        model.set_attn_implementation(previous)


@over_matrix
def test_eager_equals_sdpa(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    logits = {}
    previous = model.config._attn_implementation
    try:
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
                logits[implementation] = model(**inputs).logits
    finally:
        model.set_attn_implementation(previous)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits["eager"][valid], logits["sdpa"][valid], atol=1e-4, rtol=1e-4)


@over_matrix
def test_text_only_call_is_untouched(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs([[7], [4]])
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
            run = vlmprune.last_run(model)
    assert run.images == []
    assert run.text_tokens == [7, 4]


@over_matrix
def test_embeddings_instead_of_ids(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4]])
    inputs["position_ids"] = family.positions(model, inputs)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        expected = model(**inputs).logits
        given = {key: value for key, value in inputs.items() if key != "input_ids"}
        torch.testing.assert_close(model(**given, inputs_embeds=embeddings).logits, expected)
