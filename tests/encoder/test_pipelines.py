"""Encoder methods before methods at the other sites."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.deeper_tower import deeper_tower
from support.families import llava_next, llava_onevision, vip_llava
from support.layerwise import default_positions, language_model_inputs, row_by_layers
from support.matrix import METHOD_PARAMETERS
from support.merged_attention import shared_attention
from support.merging import entering, given_as_entered
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED
from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods import DivPrune, FasterVLM, FastV, Pool, PyramidDrop, ToMe
from vlmprune.methods.registry import make_method
from vlmprune.patches.families.registry import find_family

DENSE = [
    deeper_tower(case)
    for case in (
        LLAVA_CLIP_GQA,
        LLAVA_SIGLIP_TIED,
        *vip_llava.CASES,
        llava_next.CASES[0],
        *llava_onevision.CASES,
    )
]
ROWS = [[3, "A", 4, 5], [2, "B", 1, "small", 6]]
# One of every kind of signal that the tower is asked for.
READERS = ("fastervlm", "vtc_cls", "hiprune", "visionzip", "divprune", "zooprune", "scope", "tokencorr")


@pytest.mark.parametrize("family", DENSE, ids=str)
@pytest.mark.parametrize("second", READERS)
def test_an_input_method_reads_the_reduced_tower(second, family):
    """What it keeps is what it would keep of an unpatched tower that computed the reduced one's features."""
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    if second not in vlmprune.list_methods(model):
        pytest.skip("not served")
    chosen = make_method(second, 0.4, **METHOD_PARAMETERS[second])
    with torch.no_grad():
        with vlmprune.pruned(model, [ToMe(keep=1.0), chosen]):
            whole = model(**inputs).logits
        with vlmprune.pruned(model, chosen):
            assert torch.equal(model(**inputs).logits, whole)
        with vlmprune.pruned(model, [ToMe(keep=0.6), chosen]):
            logits = model(**inputs).logits
            run = vlmprune.last_run(model)
    assert run.method == f"tome+{second}"
    assert not torch.equal(logits, whole)
    for image in run.images:
        assert len(image.kept) < image.total


@pytest.mark.parametrize("family", [DENSE[0], DENSE[1]], ids=str)
def test_attention_of_the_reduced_tower_is_mapped_back(family):
    """FasterVLM's choice, from the plain tower: a patch gets its share of the attention to the token it was merged into."""
    model = family.build(torch.float32)
    method, patches = ToMe(keep=0.6), family.tokens("A")
    _, share = shared_attention(model, family, method)
    cls = int(find_family(model).tower_facts.has_cls)
    expected = sorted(range(patches), key=lambda patch: (-round(share[patch + cls], 7), patch))[:9]
    with torch.no_grad(), vlmprune.pruned(model, [method, FasterVLM(keep=9)]):
        model(**family.inputs([[3, "A", 4]]))
        kept = vlmprune.last_run(model).images[0].kept.tolist()
    assert kept == sorted(expected)


@pytest.mark.parametrize("output", ["full", "merged"])
@pytest.mark.parametrize("inner", [FastV(keep=0.5, layer=2), PyramidDrop(keep=0.5)], ids=lambda method: method.name)
def test_a_layer_method_behind_it(inner, output):
    family = deeper(deeper_tower(LLAVA_CLIP_GQA))
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    first = ToMe(keep=0.6, output=output)
    with torch.no_grad():
        logits = model(**inputs).logits
        with vlmprune.pruned(model, [ToMe(output=output, keep=1.0), type(inner)(keep=1.0)]):
            assert torch.equal(model(**inputs).logits, logits)
        with vlmprune.pruned(model, [first, inner]), entering(model) as entered:
            logits = model(**inputs).logits
            run = vlmprune.last_run(model)
        assert run.method == f"tome+{inner.name}"
        given = given_as_entered(model, language_model_inputs(model, inputs), entered[0], inputs, run)
        positions = default_positions(model, inner.name)
        for row, image in enumerate(run.images[:1]):
            first_stage = image.stages[0][1]
            assert len(image.kept) < len(first_stage)
            assert (len(first_stage) < image.total) == (output == "merged")
            by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
            torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)


def test_three_sites():
    family = deeper(deeper_tower(LLAVA_CLIP_GQA))
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    methods = [ToMe(keep=0.6), DivPrune(keep=0.5), PyramidDrop(keep=0.5)]
    with torch.no_grad(), vlmprune.pruned(model, methods):
        model(**inputs)
        run = vlmprune.last_run(model)
        with vlmprune.options(model, keep={"tome": 1.0, "divprune": 1.0, "pyramiddrop": 1.0}):
            logits = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert run.method == "tome+divprune+pyramiddrop"
    image = run.images[0]
    assert len(image.kept) < len(image.stages[0][1]) == 18


def test_what_is_refused():
    model = DENSE[0].build(torch.float32)
    with pytest.raises(UnsupportedMethodError, match="leaves tokens without a grid; allowed: output='full'"):
        vlmprune.apply(model, [ToMe(keep=0.5, output="merged"), Pool(keep=0.5)])
    with pytest.raises(UnsupportedMethodError, match="both act at the encoder site"):
        vlmprune.apply(model, [ToMe(keep=0.5), ToMe(keep=0.6)])
    assert not model.model._forward_pre_hooks
