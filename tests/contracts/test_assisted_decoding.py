"""Assisted decoding is lossless: with any assistant, pruned or not, the tokens are those of greedy search."""

import copy

import pytest
import torch

import vlmprune
from support.matrix import METHOD_PARAMETERS, over_matrix, over_sites, stateful

STEPS = 9
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}


def prompt(family):
    """An image between texts that end as they began, so that prompt lookup finds drafts at once."""
    inputs = family.inputs([[4, "A", 5]])
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, :2]
    return inputs


def blurred(model, share):
    """An assistant that is right sometimes: the model with noise on its weights."""
    assistant, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight += share * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return assistant


class Accepted:
    """Counts the verification calls of a model's `generate`."""

    def __init__(self, model):
        self.widths = []
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.widths.append(kwargs["input_ids"].shape[1])


@over_matrix
def test_prompt_lookup_equals_greedy(method, family):
    check_lossless(method, family, "lookup")


@over_sites
@pytest.mark.parametrize("drafts", ["unpruned assistant", "pruned assistant", "same assistant"])
def test_assistant_equals_greedy(method, family, drafts):
    check_lossless(method, family, drafts)


def check_lossless(method, family, drafts):
    model = family.build(torch.float32)
    inputs = prompt(family)
    length = inputs["input_ids"].shape[1]
    pruning = {"method": method, "keep": 0.3, **METHOD_PARAMETERS[method]}
    assistant = None if drafts == "lookup" else blurred(model, 0.0 if drafts == "same assistant" else 0.1)
    if drafts in ("pruned assistant", "same assistant"):
        vlmprune.apply(assistant, **pruning)
    how = {"prompt_lookup_num_tokens": 4} if drafts == "lookup" else {"assistant_model": assistant}
    if stateful(family):
        with torch.no_grad(), vlmprune.pruned(model, **pruning), pytest.raises(ValueError, match="stateful models"):
            model.generate(**inputs, **GREEDY, **how)
        return
    with torch.no_grad(), vlmprune.pruned(model, **pruning):
        wanted = model.generate(**inputs, **GREEDY)
        kept = [image.kept.tolist() for image in vlmprune.last_run(model).images]
        text = vlmprune.last_run(model).text_tokens
        seen = Accepted(model)
        try:
            assert torch.equal(model.generate(**inputs, **GREEDY, **how), wanted)
        finally:
            seen.handle.remove()
        run = vlmprune.last_run(model)
    assert [image.kept.tolist() for image in run.images] == kept
    assert run.text_tokens == text
    # Drafts were verified together with the prompt, and the model was pruned.
    assert seen.widths[0] > length
    assert run.visual_tokens_per_layer[0][-1] < family.tokens("A")


@pytest.mark.parametrize(("method", "family"), [case for case in over_sites.args[1] if not stateful(case.values[1])])
def test_turns_go_on_from_an_assisted_one(method, family):
    """Image and question, answered with drafts; then a question and an image with one, on the same cache."""
    model = family.build(torch.float32)
    first, second = prompt(family), family.inputs([["B", 3]])
    lookup = {"prompt_lookup_num_tokens": 4}

    def converse(how):
        turn = model.generate(**first, **GREEDY, **how, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, turn.sequences[:, :2]], 1)
        cache = turn.past_key_values
        turn = model.generate(input_ids=ids, past_key_values=cache, **GREEDY, **how, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, second["input_ids"], turn.sequences[:, :2]], 1)
        inputs = family.longer(model, [first, second], ids, torch.ones_like(ids))
        return model.generate(**inputs, past_key_values=turn.past_key_values, **GREEDY, **how)

    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        assert torch.equal(converse(lookup), converse({}))
