"""Contracts 9, 10 and 12: one selection a prefill, the same answer every time, no mixing of calls."""

import torch

import vlmprune
from support.matrix import BY_THE_LAST_TOKEN, ENCODER_METHODS, LAYER_METHODS, METHOD_PARAMETERS, over_matrix
from support.oracle import suppressed
from support.threads import generated_at_once
from vlmprune.methods.registry import get_method


@over_matrix
def test_one_selection_a_prefill_and_none_at_decode(method, family, monkeypatch):
    model = family.build(torch.float32)
    cls, calls = get_method(method), []
    at_layers = cls.site == "layer" and method in BY_THE_LAST_TOKEN
    entry = "select_at_layer" if at_layers else "reduce" if method in ENCODER_METHODS else "select"
    original = getattr(cls, entry)

    def noted(self, batch):
        calls.append(len(batch.hidden) if method in ENCODER_METHODS else len(batch.counts))
        return original(self, batch)

    monkeypatch.setattr(cls, entry, noted)
    inputs = family.inputs([[3, "A", 4], [2, "B", 1, "C", 6], [9]])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=2)
        cuts = len(vlmprune.last_run(model).images[0].stages) - 1
    if at_layers:
        assert calls == [6] * cuts, "one call a stage for the images of all rows"
    else:
        # Older hosts encode the images that they have repeated for the beams.
        encoded = 3 if hasattr(model, "_supports_mm_encoder_outputs") else 6
        if method in ENCODER_METHODS:
            assert set(calls) == {encoded}, "one call a block for the tiles of all images"
            assert len(calls) < model.config.vision_config.num_hidden_layers
            return
        assert calls == [encoded], "one call for all images, each image once however many beams show it"


@over_matrix
def test_the_same_call_gives_the_same_bits(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs([[3, "A", 4], [2, "B", 1, "C", 6], [9]])
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        first, second = model(**inputs).logits, model(**inputs).logits
        kept = [image.kept.tolist() for image in vlmprune.last_run(model).images]
    assert torch.equal(first, second)
    # In order, except where merged tokens stand behind the others of their image.
    inside = method in LAYER_METHODS and get_method(method).merges
    assert all((sorted(indices) if inside else indices) == sorted(set(indices)) for indices in kept)


@over_matrix
def test_threads_do_not_mix(method, family):
    model = family.build(torch.float32)
    prompts = [family.inputs([[3, name, 4], [2 + index]]) for index, name in enumerate("ABCD")]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        expected = [model.generate(**prompt, **greedy) for prompt in prompts]
        results = generated_at_once(model, prompts, greedy)
    assert all(torch.equal(result, answer) for result, answer in zip(results, expected, strict=True))


@over_matrix
def test_interleaved_generations_do_not_mix(method, family):
    model = family.build(torch.float32)
    prompts = [family.inputs([[3, "A", 4], [6]]), family.inputs([[1, "B", 1, "C", 7]])]
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        expected = [model.generate(**prompt, max_new_tokens=4, do_sample=False) for prompt in prompts]
        states = []
        for prompt in prompts:
            positions = family.positions(model, prompt)
            output = model(**prompt, position_ids=positions, use_cache=True)
            tokens = [suppressed(output.logits[:, -1]).argmax(-1)]
            states.append([output.past_key_values, prompt["attention_mask"], positions[..., -1:], tokens])
        for _ in range(3):
            for state in states:
                cache, mask, positions, tokens = state
                state[1] = mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                state[2] = positions = positions + 1
                output = model(
                    input_ids=tokens[-1][:, None], attention_mask=mask, position_ids=positions, past_key_values=cache
                )
                tokens.append(suppressed(output.logits[:, -1]).argmax(-1))
    for (*_, tokens), answer in zip(states, expected, strict=True):
        assert torch.equal(torch.stack(tokens, 1), answer[:, -4:])
