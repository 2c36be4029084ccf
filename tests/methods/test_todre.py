"""ToDRE's first stage."""

import pytest
import torch

import vlmprune
from support import method_batches as build
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import ParameterError, UnknownNameError
from vlmprune.methods import ToDRE


def test_the_pivot_has_the_highest_attention_and_comes_first():
    method = ToDRE(keep=5)
    batch = build.random_batch(method, [build.raster_layout(4, 4)], 8)
    (signal,) = batch.vision
    assert signal == ("cls_attention", 9)
    assert method.order(batch)[0] == batch.vision[signal].mean(-1).argmax()


def test_without_cls_the_pivot_comes_from_the_feature_layer():
    (signal,) = ToDRE().vision_signals(build.WITHOUT_CLS)
    assert signal == ("received_attention", 9)


def test_the_pivot_of_a_tiled_image_lies_in_the_thumbnail():
    layout = build.anyres_layout((2, 2), 3, 90, 140)
    method = ToDRE(keep=5)
    batch = build.random_batch(method, [layout, layout], 8)
    (signal,) = batch.vision
    batch.vision[signal][torch.cat([layout.tile, layout.tile]) > 0] = 9.0
    order = method.order(batch).view(2, 5)
    patches = (~layout.newline).nonzero().flatten()
    assert (layout.tile[patches[order[:, 0]]] == 0).all()


def test_newlines_are_never_picked_before_patches():
    layout = build.anyres_layout((2, 2), 3, 90, 140)
    patches = int((~layout.newline).sum())
    for keep in (patches, patches + 2):
        method = ToDRE(keep=keep)
        kept = method.select(build.random_batch(method, [layout], 1)).kept
        assert int(layout.newline[kept].sum()) == keep - patches


@pytest.mark.parametrize("variant", ["max_sum", "kcenter"])
def test_orthogonal_tokens_are_picked_before_copies(variant):
    features = torch.eye(4).repeat(4, 1)
    method = ToDRE(keep=4, variant=variant)
    batch = build.random_batch(method, [build.raster_layout(4, 4)], 8)
    batch = build.make_batch(method, batch.layouts, features, batch.vision, build.WITH_CLS)
    assert features[method.select(batch).kept].sum(0).tolist() == [1.0] * 4


def test_two_stages_unless_nothing_is_to_be_dropped():
    assert [part.name for part in ToDRE(keep=0.5).parts()] == ["todre", "todre_relevance"]
    assert [part.name for part in ToDRE(keep=1.0).parts()] == ["todre"]
    assert [part.name for part in ToDRE(keep=0.5, relevance=False).parts()] == ["todre"]
    assert ToDRE(layer=3, tau=0.2).parts()[1].tau == 0.2


def test_bad_parameters_are_refused():
    with pytest.raises(UnknownNameError, match="kcenter"):
        ToDRE(variant="k-center")
    with pytest.raises(ParameterError, match="tau"):
        ToDRE(tau=2)


@pytest.fixture(scope="module")
def llava():
    family = LLAVA_CLIP_GQA
    return family.build(torch.float32), family.inputs([[3, "A", 4], [2, "B", 5]], dtype=torch.float32)


@torch.no_grad()
def logits_and_record(llava, **parameters):
    model, inputs = llava
    with vlmprune.pruned(model, "todre", **parameters):
        return model(**inputs).logits, vlmprune.last_run(model)


def test_the_second_stage_drops_all_visual_tokens_of_late_layers(llava):
    _, record = logits_and_record(llava, keep=0.5, tau=1.0)
    assert record.method == "todre"
    assert record.visual_tokens_per_layer == [[18, 18, 0], [18, 18, 0]]
    _, earlier = logits_and_record(llava, keep=0.5, tau=1.0, layer=1)
    assert earlier.visual_tokens_per_layer == [[18, 0, 0], [18, 0, 0]]


def test_a_second_stage_that_keeps_everything_changes_nothing(llava):
    alone, _ = logits_and_record(llava, keep=0.5, relevance=False)
    both, record = logits_and_record(llava, keep=0.5, tau=0.0)
    assert torch.equal(alone, both)
    assert record.visual_tokens_per_layer == [[18, 18, 18], [18, 18, 18]]


def test_keeping_everything_is_the_unpatched_model(llava):
    model, inputs = llava
    logits, _ = logits_and_record(llava, keep=1.0, tau=1.0)
    with torch.no_grad():
        assert torch.equal(logits, model(**inputs).logits)
