"""Input methods that choose among the tokens that a reduced tower hands on."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.deeper_tower import deeper_tower
from support.families import vip_llava
from support.layerwise import default_positions, language_model_inputs, row_by_layers
from support.matrix import METHOD_PARAMETERS
from support.merged_attention import shared_attention
from support.merging import entering, given_as_entered
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED
from vlmprune.kernels.max_min import max_min
from vlmprune.methods import DivPrune, FasterVLM, PyramidDrop, ToMe
from vlmprune.methods.registry import make_method
from vlmprune.patches.families.registry import find_family

FAMILIES = [deeper(deeper_tower(case)) for case in (LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED, *vip_llava.CASES)]
ROWS = [[3, "A", 4, 5], [2, "B", 1, "small", 6], [7, 8]]
over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
# One of every kind of signal that the tower is asked for, one that merges, and those that hand on to a second stage.
CHOOSERS = ("uniform", "fastervlm", "hiprune", "visionzip", "divprune", "zooprune", "scope", "visiondrop", "aim")
MERGED = ToMe(keep=0.6, output="merged")


@over_families
def test_diverse_tokens_are_chosen_among_the_merged_ones(family):
    model, inputs = family.build(torch.float64), family.inputs(ROWS)
    with torch.no_grad():
        with vlmprune.pruned(model, MERGED), entering(model) as entered:
            model(**inputs)
            alone = vlmprune.last_run(model).images
        with vlmprune.pruned(model, [MERGED, DivPrune(keep=0.25)]):
            model(**inputs)
            images = vlmprune.last_run(model).images
    assert images[0].total > len(alone[0].kept) > len(images[0].kept) == round(0.25 * images[0].total)
    given = given_as_entered(model, language_model_inputs(model, inputs), entered[0], inputs, _run(model, inputs))
    visual = inputs["input_ids"][0] == model.config.image_token_id
    features = given["inputs_embeds"][0][visual][alone[0].kept]
    budget = len(images[0].kept)
    picks = max_min(features, [0, len(features)], [budget]).sort().values
    assert images[0].kept.tolist() == alone[0].kept[picks].tolist()
    # Each patch went where its token went, or nowhere.
    numbers = {int(pick): number for number, pick in enumerate(picks)}
    assert images[0].groups.tolist() == [numbers.get(int(token), -1) for token in alone[0].groups]


def _run(model, inputs):
    with vlmprune.pruned(model, MERGED):
        model(**inputs)
        return vlmprune.last_run(model)


@pytest.mark.parametrize("family", FAMILIES[:2], ids=str)
def test_a_token_has_the_attention_of_all_its_patches(family):
    """FasterVLM's choice, from the plain tower."""
    model = family.build(torch.float64)
    adapter = find_family(model)
    cls = int(adapter.tower_facts.has_cls)
    states, share = shared_attention(model, family, MERGED)
    last = states[max(adapter.state_layers)]
    totals = {
        place - cls: sum(share[member] for member in members)
        for place, members in zip(last.places, last.members, strict=True)
        if place >= cls
    }
    expected = sorted(sorted(totals, key=lambda place: -totals[place])[:7])
    with torch.no_grad(), vlmprune.pruned(model, [MERGED, FasterVLM(keep=7)]):
        model(**family.inputs([[3, "A", 4]]))
        assert vlmprune.last_run(model).images[0].kept.tolist() == expected


@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("family", FAMILIES[:2], ids=str)
def test_identity_oracle_and_batch(chooser, family):
    model, inputs = family.build(torch.float64), family.inputs(ROWS)
    second = make_method(chooser, 0.25, **METHOD_PARAMETERS[chooser])
    layered = any(part.site == "layer" for part in second.parts())
    methods = [MERGED, second, *([] if layered else [PyramidDrop(keep=0.5)])]
    with torch.no_grad():
        whole = model(**inputs).logits
        with vlmprune.pruned(model, [ToMe(keep=1.0, output="merged"), *(type(one)(keep=1.0) for one in methods[1:])]):
            assert torch.equal(model(**inputs).logits, whole)
        with vlmprune.pruned(model, methods), entering(model) as entered:
            logits = model(**inputs).logits
            run = vlmprune.last_run(model)
            alone = [model(**family.inputs([row])).logits[0] for row in ROWS[:2]]
    given = given_as_entered(model, language_model_inputs(model, inputs), entered[0], inputs, run)
    positions = default_positions(model, methods[-1].name)
    for row in range(2):
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        if not layered:
            torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)
        mine = logits[row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(mine, alone[row], atol=2e-5, rtol=1e-4)
    for image in run.images:
        assert int(image.groups.max()) + 1 == len(image.stages[0][1]) < image.total


def test_a_share_that_leaves_more_than_the_tower_does_keeps_what_it_left():
    family = FAMILIES[0]
    model, inputs = family.build(torch.float64), family.inputs(ROWS)
    with torch.no_grad():
        with vlmprune.pruned(model, ToMe(keep=0.5, output="merged")):
            expected = model(**inputs).logits
        with vlmprune.pruned(model, [ToMe(keep=0.5, output="merged"), DivPrune(keep=0.7)]):
            assert torch.equal(model(**inputs).logits, expected)
