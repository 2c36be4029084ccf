"""The contracts for methods that drop inside the language model: identity, undo, backends, beams, shapes."""

import copy

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA, cache_lengths
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

import vlmprune
from support.threads import generated_at_once
from vlmprune.errors import UnsupportedCallError
from vlmprune.methods import DivPrune, FastV, PyramidDrop, ToDRERelevance

PYRAMID = PyramidDrop(layers=(2, 4, 6), ratios=(0.5, 0.25, 0.125))
METHODS = {
    "pyramiddrop": PYRAMID,
    "fastv": FastV(layer=2, ratio=0.6),
    "todre_relevance": ToDRERelevance(tau=1.0, layer=3),
    "pipeline": [DivPrune(keep=0.5), PYRAMID],
}
ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9]]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
over_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture
def model():
    return DEEP_LLAVA.build(torch.float32)


@pytest.fixture
def inputs():
    return DEEP_LLAVA.inputs(ROWS)


def state_of(model):
    return [
        (name, dict(module.__dict__), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize(
    "method",
    [
        PyramidDrop(keep=1.0),
        PyramidDrop(layers=(2,), ratios=(1.0,)),
        PyramidDrop(keep=400),
        FastV(keep=1.0),
        FastV(ratio=0.0),
        ToDRERelevance(tau=0.0),
        [DivPrune(keep=1.0), PyramidDrop(keep=1.0)],
    ],
    ids=repr,
)
def test_dropping_nothing_changes_no_bit(model, inputs, method):
    with torch.no_grad():
        before, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with vlmprune.pruned(model, method):
            assert torch.equal(model(**inputs).logits, before)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
            run = vlmprune.last_run(model)
    assert [set(row) for row in run.visual_tokens_per_layer] == [{36}, {72}, {0}]
    assert [len(image.kept) for image in run.images] == [36, 36, 36]


@over_methods
def test_undo_is_exact(model, inputs, method):
    with torch.no_grad():
        expected = model(**inputs).logits
        before = state_of(model)
        with vlmprune.pruned(model, method):
            assert not torch.equal(model(**inputs).logits, expected)
        assert state_of(model) == before
        assert torch.equal(model(**inputs).logits, expected)


def test_undo_after_an_exception_inside_a_layer(model, inputs):
    with torch.no_grad():
        expected = model(**inputs).logits
        vlmprune.apply(model, PYRAMID)

        def explode(*_):
            raise RuntimeError("inside layer 5")

        handle = model.model.language_model.layers[5].register_forward_pre_hook(explode)
        with pytest.raises(RuntimeError, match="inside layer 5"):
            model(**inputs)
        handle.remove()
        pruned = model(**inputs).logits
        assert torch.equal(pruned, model(**inputs).logits)
        vlmprune.remove(model)
        assert torch.equal(model(**inputs).logits, expected)


@over_methods
@pytest.mark.parametrize("padding", ["left", "right"])
def test_eager_equals_sdpa(model, method, padding):
    inputs = DEEP_LLAVA.inputs(ROWS, padding)
    with torch.no_grad(), vlmprune.pruned(model, method):
        wanted, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        model.set_attn_implementation("eager")
        try:
            torch.testing.assert_close(model(**inputs).logits, wanted, atol=2e-4, rtol=2e-4)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
        finally:
            model.set_attn_implementation("sdpa")


def two_dimensional(module, query, key, value, attention_mask, **kwargs):
    """Stands in for flash attention: takes the 2-D padding mask and makes the causal part itself."""
    assert attention_mask is None or (attention_mask.ndim == 2 and attention_mask.shape[1] == key.shape[2])
    length, keys = query.shape[2], key.shape[2]
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()
    return sdpa_attention_forward(module, query, key, value, mask, **{**kwargs, "is_causal": False})


@over_methods
def test_backend_with_a_two_dimensional_mask(model, method):
    AttentionInterface.register("two_dimensional", two_dimensional)
    AttentionMaskInterface.register("two_dimensional", flash_attention_mask)
    language_model = model.model.language_model
    for rows in (ROWS, ROWS[:1]):
        inputs = DEEP_LLAVA.inputs(rows)
        with torch.no_grad(), vlmprune.pruned(model, method):
            wanted, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
            last = wanted[:, -1]
            language_model.config._attn_implementation = "two_dimensional"
            try:
                torch.testing.assert_close(model(**inputs).logits[:, -1], last, atol=2e-4, rtol=2e-4)
                assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
            finally:
                language_model.config._attn_implementation = "sdpa"


@over_methods
def test_beams_and_return_sequences(model, inputs, method):
    with torch.no_grad(), vlmprune.pruned(model, method):
        beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, **GREEDY)
        for row, prompt in enumerate(ROWS):
            if any(isinstance(item, str) for item in prompt):
                alone = model.generate(**DEEP_LLAVA.inputs([prompt]), num_beams=3, num_return_sequences=2, **GREEDY)
                assert torch.equal(alone[:, -5:], beams[2 * row : 2 * row + 2, -5:])
        torch.manual_seed(0)
        sampled = model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=3)
        assert len(sampled) == 9
        run = vlmprune.last_run(model)
    for first in (0, 3, 6):
        rows = run.visual_tokens_per_layer[first : first + 3]
        assert rows[0] == rows[1] == rows[2]


@over_methods
def test_without_a_cache(model, inputs, method):
    with torch.no_grad(), vlmprune.pruned(model, method):
        wanted = model(**inputs, use_cache=True)
        output = model(**inputs, use_cache=False)
        assert output.past_key_values is None
        torch.testing.assert_close(output.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(
            model.generate(**inputs, **GREEDY)[:, -5],
            model.generate(**inputs, max_new_tokens=1, do_sample=False, use_cache=False)[:, -1],
        )


def test_shapes_outside_stay(model, inputs):
    columns = inputs["input_ids"].shape[1]
    with torch.no_grad(), vlmprune.pruned(model, PYRAMID):
        output = model(**inputs, output_hidden_states=True, labels=inputs["input_ids"].clamp(max=100))
        run = vlmprune.last_run(model)
        assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2
    assert output.loss.isfinite()
    assert [state.shape[1] for state in output.hidden_states] == [columns] * 9
    for layer, state in enumerate(output.hidden_states[1:]):
        alive = run.text_tokens[1] + run.visual_tokens_per_layer[1][layer]
        valid = inputs["attention_mask"][1].bool()
        assert int(state[1, valid].abs().sum(-1).gt(0).sum()) == alive


def test_caches_shrink_layer_by_layer(model):
    with torch.no_grad(), vlmprune.pruned(model, PYRAMID):
        cache = model(**DEEP_LLAVA.inputs([[3, "A", 4]]), use_cache=True).past_key_values
        run = vlmprune.last_run(model)
    assert run.visual_tokens_per_layer == [[36, 36, 18, 18, 9, 9, 4, 4]]
    assert cache_lengths(cache) == [43, 43, 25, 25, 16, 16, 11, 11]
    assert run.signal == "last token attention layer 2, 4, 6"
    (image,) = run.images
    assert [(layer, len(kept)) for layer, kept in image.stages] == [(0, 36), (2, 18), (4, 9), (6, 4)]
    assert set(image.stages[3][1].tolist()) < set(image.stages[2][1].tolist()) < set(image.stages[1][1].tolist())
    assert torch.equal(image.kept, image.stages[3][1])


def test_keys_of_the_cut_layer_are_projected_once(model):
    widths = []
    with torch.no_grad(), vlmprune.pruned(model, PYRAMID):
        handle = model.model.language_model.layers[2].self_attn.k_proj.register_forward_pre_hook(
            lambda module, args: widths.append(args[0].shape[1])
        )
        model(**DEEP_LLAVA.inputs([[3, "A", 4]]))
        handle.remove()
    assert widths == [43, 0]


def test_gradients_flow_through_a_pruned_prefill(model):
    with vlmprune.pruned(model, PYRAMID):
        output = model(**DEEP_LLAVA.inputs([[3, "A", 4]]))
        output.logits[0, -1].sum().backward()
    weight = model.model.language_model.layers[2].self_attn.k_proj.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


def test_cache_of_another_method_is_refused(model):
    inputs = DEEP_LLAVA.inputs([[3, "A", 4]])
    with torch.no_grad(), vlmprune.pruned(model, PYRAMID):
        cache = model(**inputs, use_cache=True).past_key_values
    with (
        torch.no_grad(),
        vlmprune.pruned(model, "divprune"),
        pytest.raises(UnsupportedCallError, match="from layer 2 on"),
    ):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_text_only_calls_are_untouched(model):
    inputs = DEEP_LLAVA.inputs([[5], [8]])
    with torch.no_grad():
        expected = model.generate(**inputs, **GREEDY)
        with vlmprune.pruned(model, PYRAMID):
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
            assert vlmprune.last_run(model).visual_tokens_per_layer == [[0] * 8] * 2


def test_a_copied_cache_goes_its_own_way(model):
    with torch.no_grad(), vlmprune.pruned(model, PYRAMID):
        cache = model(**DEEP_LLAVA.inputs([[3, "A", 4]]), use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
        first = model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache).logits
        second = model(input_ids=torch.tensor([[5, 6]]), past_key_values=copied).logits
    assert torch.equal(first, second)


def test_half_precision(model):
    half = DEEP_LLAVA.build(torch.bfloat16)
    inputs = DEEP_LLAVA.inputs(ROWS, dtype=torch.bfloat16)
    with torch.no_grad(), vlmprune.pruned(half, PYRAMID):
        assert half(**inputs).logits.isfinite().all()
        assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5


@over_methods
def test_threads_do_not_mix(model, method):
    prompts = [DEEP_LLAVA.inputs([[3, name, 4], [2 + index]]) for index, name in enumerate("ABC")]
    with torch.no_grad(), vlmprune.pruned(model, method):
        expected = [model.generate(**prompt, **GREEDY) for prompt in prompts]
        results = generated_at_once(model, prompts, GREEDY)
    assert all(torch.equal(result, answer) for result, answer in zip(results, expected, strict=True))
