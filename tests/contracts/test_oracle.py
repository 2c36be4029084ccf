"""Contract 3: a pruned forward equals the unpatched layers on the tokens alive in each, prefill and decode."""

import pytest
import torch

import vlmprune
from support.layerwise import check_greedy, default_positions, language_model_inputs, row_by_layers
from support.matrix import LAYER_METHODS, MERGE_BEFORE, METHOD_PARAMETERS, few_tokens, over_matrix
from support.merging import COMBINED, entering, given_as_entered, given_merged

ROWS = {
    "single": [[3, "A", 4]],
    "left-padded": [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]],
}


@over_matrix
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("keep", [0.3, "few"])
def test_pruned_forward_equals_the_layers_by_hand(method, family, rows, keep):
    model = family.build(torch.float32)
    inputs = family.inputs(rows)
    budget = few_tokens(method, family) if keep == "few" else keep
    steps = 6
    pruned = vlmprune.pruned(model, method, keep=budget, **METHOD_PARAMETERS[method])
    with torch.no_grad(), pruned, entering(model) as entered:
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        generated = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, -steps:]
    given, positions = given_to_layers(model, method, inputs, run, entered), default_positions(model, method)
    for row in range(len(rows)):
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)
        check_greedy(model, inputs, run, row, positions, generated[row], given)
        assert run.visual_tokens_per_layer[row][-1] == len(by_hand.columns) - run.text_tokens[row]
        if method not in LAYER_METHODS:
            assert len(set(run.visual_tokens_per_layer[row])) == 1


@over_matrix
def test_pruned_forward_equals_the_layers_by_hand_in_bf16(method, family):
    model = family.build(torch.bfloat16)
    inputs = family.inputs(ROWS["left-padded"], dtype=torch.bfloat16)
    pruned = vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method])
    with torch.no_grad(), pruned, entering(model) as entered:
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
    given, positions = given_to_layers(model, method, inputs, run, entered), default_positions(model, method)
    for row in range(len(logits)):
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        # The padded row and the row alone are rounded differently; where that sends a token to another expert it is far off.
        error = (logits[row, by_hand.columns] - by_hand.logits).float().norm(dim=-1)
        assert (error / by_hand.logits.float().norm(dim=-1)).median() < 0.05


def given_to_layers(model, method, inputs, run, entered):
    """What the host hands to its language model, with the visual tokens of a merging method merged."""
    given = language_model_inputs(model, inputs)
    if method not in MERGE_BEFORE:
        return given
    if method in COMBINED:
        return given_merged(given, inputs, run, model.config.image_token_id)
    return given_as_entered(model, given, entered[0], inputs, run)
