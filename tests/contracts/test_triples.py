"""One method at each site, in the vision tower, before the language model and between its layers, over all families."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.deeper_tower import deeper_tower
from support.family_cases import FAMILY_CASES
from support.layerwise import default_positions, language_model_inputs, row_by_layers
from support.matrix import ONE_OF_EACH_KIND
from support.merging import entering, given_as_entered
from vlmprune.methods.registry import make_method

ROWS = [[3, "A", 4, 5], [2, "B", 1, "small", 6], [7, 8]]
# The first runs everywhere. Its input method scores by features, those of the others by the tower's attention and by both ends.
TRIPLES = {
    "tome-divprune-pyramiddrop": (("tome", 0.6), ("divprune", 0.5), ("pyramiddrop", 0.5)),
    "expedite-fastervlm-fastv": (("expedite", 0.5), ("fastervlm", 0.5), ("fastv", 0.8)),
    "crossget-visionzip-dart": (("crossget", 0.6), ("visionzip", 0.5), ("dart", 0.8)),
    "zero_tprune-vtc_cls-pyramiddrop": (("zero_tprune", 0.7), ("vtc_cls", 0.5), ("pyramiddrop", 0.5)),
}
PARAMETERS = {"fastv": {"layer": 1}, "visionzip": {"merge_at": "projected", "cls_token": False}}


def cases():
    for number, (name, triple) in enumerate(TRIPLES.items()):
        for family in FAMILY_CASES:
            served = vlmprune.list_methods(family.build(torch.float32))
            if any(method not in served for method, _ in triple):
                continue
            marks = () if number == 0 or family in ONE_OF_EACH_KIND else (pytest.mark.whole,)
            yield pytest.param(triple, deeper(deeper_tower(family)), id=f"{name}-{family}", marks=marks)


over_triples = pytest.mark.parametrize(("triple", "family"), list(cases()))


def made(triple, keep=None):
    return [make_method(name, keep or own, **PARAMETERS.get(name, {})) for name, own in triple]


@over_triples
def test_identity_and_undo(triple, family):
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
        hooks = counted_hooks(model)
        with vlmprune.pruned(model, made(triple, 1.0)):
            assert torch.equal(model(**inputs).logits, logits)
        with vlmprune.pruned(model, made(triple)):
            assert not torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model(**inputs).logits, logits)
    assert counted_hooks(model) == hooks


def counted_hooks(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@over_triples
def test_oracle_and_batch(triple, family):
    """What enters is run by hand through the unpatched layers; each row is what it is alone."""
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    methods = made(triple)
    with torch.no_grad():
        with vlmprune.pruned(model, methods):
            logits = model(**inputs).logits
            run = vlmprune.last_run(model)
            alone = [model(**family.inputs([row])).logits[0] for row in ROWS[:2]]
        # Without the last, so that the deeper features of Qwen3-VL are as they enter.
        with vlmprune.pruned(model, methods[:2]), entering(model) as entered:
            model(**inputs)
    assert run.method == "+".join(name for name, _ in triple)
    given = given_as_entered(model, language_model_inputs(model, inputs), entered[0], inputs, run)
    positions = default_positions(model, triple[-1][0])
    for row, image in enumerate(run.images[:2]):
        assert len(image.stages[0][1]) < image.total, "the input method must drop something"
        assert len(image.kept) < len(image.stages[0][1]), "and the layer method too"
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)
        mine = logits[row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(mine, alone[row], atol=2e-5, rtol=1e-4)
    groups = run.images[0].tower_groups
    assert groups is not None
    assert all(part.max() + 1 < len(part) for part in groups), "and the tower's"
