"""What methods need: declared, checked at `apply`, and said in the error."""

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vlmprune
from support import method_batches as build
from support.family_cases import FAMILY_CASES
from support.matrix import REQUIRED
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods import InputMethod
from vlmprune.methods.needs import (
    NEEDS,
    PIXELS,
    STILL_IMAGES,
    TOWER_ATTENTION,
    TOWER_FEATURES,
    LayerNeed,
    Need,
    ordered,
)
from vlmprune.methods.pass_through import PassThrough
from vlmprune.methods.pipeline import make_pipeline
from vlmprune.methods.registry import METHODS, make_method
from vlmprune.patches.families.registry import find_family

PARTS = [part for name in METHODS for part in make_method(name, **REQUIRED.get(name, {})).parts()]


def test_rows_are_told_apart_by_their_names():
    assert len({need.name for need in NEEDS}) == len(NEEDS)
    assert all(need.sentence and need.supplied_by for need in NEEDS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_what_a_method_reads_is_among_its_needs(part):
    assert part.needs <= set(NEEDS)
    readings = [need for need in part.needs if isinstance(need, LayerNeed)]
    assert bool(readings) == (part.site == "layer")
    if part.site == "layer":
        assert {part.reading_at(cut, 32) for cut in part.cut_layers(32)} <= set(readings)
    if part.site == "input":
        signals = [signal for tower in (build.WITH_CLS, build.WITHOUT_CLS) for signal in part.vision_signals(tower)]
        assert (PIXELS in part.needs) == ("kept_pixels" in {signal.kind for signal in signals})
        features = {signal.kind.endswith("features") for signal in signals if signal.kind != "kept_pixels"}
        assert TOWER_ATTENTION in part.needs or False not in features
        assert TOWER_FEATURES in part.needs or True not in features


@pytest.mark.parametrize("family", FAMILY_CASES, ids=str)
def test_methods_that_a_family_does_not_serve_say_what_is_missing(family):
    model = family.build(torch.float32)
    served, facts = vlmprune.list_methods(model), find_family(model)
    for name, cls in METHODS.items():
        missing = [need for need in ordered(cls.needs) if not need.met_by(facts)]
        assert (name in served) == (not missing)
        if missing:
            with pytest.raises(UnsupportedMethodError) as error:
                vlmprune.apply(model, name)
            assert f"{name!r} needs {missing[0].sentence}, which this {facts.name} model" in str(error.value)
            assert not model.model._forward_pre_hooks


def test_a_tower_whose_attention_cannot_be_read_serves_the_other_methods():
    tower = {
        "model_type": "dinov2",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = LLAVA_CLIP_GQA.build(torch.float32).config.text_config.to_dict()
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, vision_feature_layer=-1))
    served = vlmprune.list_methods(model)
    assert {"random", "divprune", "fastv"} <= set(served)
    assert not [name for name in served if TOWER_ATTENTION in METHODS[name].needs]
    with pytest.raises(UnsupportedMethodError, match="a vision tower whose attention can be read"):
        vlmprune.apply(model, "fastervlm")


def test_one_more_need_is_one_more_row():
    """A need from outside: read from the family's facts, said in the error, met or not."""
    depth = Need("depth", "a language model of 99 layers", "the model", lambda family: family.decoder_layers >= 99)

    class Deep(InputMethod):
        name = "deep"
        needs = frozenset({STILL_IMAGES, depth})

    with pytest.raises(UnsupportedMethodError, match="'deep' needs a language model of 99 layers"):
        vlmprune.apply(LLAVA_CLIP_GQA.build(torch.float32), Deep())


def test_where_nothing_acts_at_the_input_everything_passes():
    assert make_pipeline([make_method("fastv")]).at_input == PassThrough()
    assert make_pipeline([make_method("divprune")]).at_layers is None
    assert "pass_through" not in METHODS
    method = PassThrough(keep=0.1)
    batch = build.random_batch(method, [build.raster_layout(2, 3), build.raster_layout(1, 2)], 0)
    assert batch.budgets == (6, 2)
    assert method.select(batch).kept.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
