"""Methods at different sites in one prefill: every pair of them, against the unpatched layers by hand."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families import llava_next, llava_onevision, qwen3_vl
from support.layerwise import Positions, alive_columns, language_model_inputs, row_by_layers
from support.matrix import METHOD_PARAMETERS
from support.tiny_models import LLAVA_CLIP_GQA
from support.video_matrix import as_served
from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods.needs import VIDEOS
from vlmprune.methods.registry import METHODS, make_method

FAMILIES = [deeper(LLAVA_CLIP_GQA), deeper(qwen3_vl.CASES[0])]
TILED = deeper(llava_next.CASES[0])
VIDEO_FAMILIES = [deeper(qwen3_vl.CASES[0]), deeper(llava_onevision.CASES[0])]
FOR_VIDEOS = [name for name, cls in METHODS.items() if VIDEOS in cls.needs]
ROWS = [[3, "A", 4, 5], [2, "B", 1, "small", 6]]


def of_sites(*sites):
    """Names of the methods that act at just these sites."""
    acting = {name: cls().parts() for name, cls in METHODS.items()}
    # Methods for videos: tests/contracts/test_videos.py.
    images = {name: parts for name, parts in acting.items() if not any(VIDEOS in part.needs for part in parts)}
    return [name for name, parts in images.items() if [part.site for part in parts] == list(sites)]


def _pairs():
    for first in of_sites("input"):
        served = [family for family in FAMILIES if first in vlmprune.list_methods(family.build(torch.float32))]
        for second in of_sites("layer"):
            for family in served or [TILED]:
                yield pytest.param(first, second, family, id=f"{first}-{second}-{family}")


over_pairs = pytest.mark.parametrize(("first", "second", "family"), list(_pairs()))


def pipeline(first, second, keep):
    return [
        make_method(first, keep, **METHOD_PARAMETERS.get(first, {})),
        make_method(second, 0.8 if keep < 1 else 1.0, **METHOD_PARAMETERS.get(second, {})),
    ]


@over_pairs
def test_identity(first, second, family):
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
        with vlmprune.pruned(model, pipeline(first, second, 1.0)):
            assert torch.equal(model(**inputs).logits, logits)


@over_pairs
def test_oracle(first, second, family):
    check_by_hand(family.build(torch.float32), family.inputs(ROWS), pipeline(first, second, 0.5))


@pytest.mark.parametrize("family", VIDEO_FAMILIES, ids=str)
@pytest.mark.parametrize("first", FOR_VIDEOS)
def test_oracle_of_a_video_with_fastv(first, family):
    rows = as_served(first, family, [[3, "video", 4], [2, "video small", 1]])
    # HoliTom has a second step of its own, which acts where FastV does.
    parameters = {name: value for name, value in METHOD_PARAMETERS[first].items() if not name.startswith("inner")}
    methods = [make_method(first, 0.5, **parameters), make_method("fastv", 0.8, **METHOD_PARAMETERS["fastv"])]
    check_by_hand(family.build(torch.float32), family.inputs(rows), methods)


def check_by_hand(model, inputs, methods):
    """Compare a pruned forward with the layers by hand."""
    with torch.no_grad(), vlmprune.pruned(model, methods):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        compact = model.__dict__["_vlmprune"].sites.positions == "compact"
    given = entered(model, methods[0], inputs)
    own = methods[1].positions
    positions = Positions(compact, compact if own is None else own == "compact")
    for row, image in enumerate(run.images[:1]):
        assert len(image.kept) < len(image.stages[0][1]) < image.total, "both methods must drop something"
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)
    assert run.method == "+".join(method.name for method in methods)


def entered(model, method, inputs):
    """What the language model is given, with the visual tokens as the input method leaves them (some merge)."""
    given = language_model_inputs(model, inputs)
    with vlmprune.pruned(model, method):
        compacted = language_model_inputs(model, inputs)
        model(**inputs)
        run = vlmprune.last_run(model)
    visual = given.get("visual_pos_masks")
    embeddings = given["inputs_embeds"].clone()
    deep = [plane.clone() for plane in given.get("deepstack_visual_embeds") or ()]
    done = 0
    for row in range(len(embeddings)):
        columns = alive_columns(model, inputs, run, row, 0)
        embeddings[row, columns] = compacted["inputs_embeds"][row, -len(columns) :]
        if visual is None:
            continue
        kept = columns[visual[row, columns]]
        ranks = visual.flatten().cumsum(0).view_as(visual)[row, kept] - 1
        for plane, shorter in zip(deep, compacted["deepstack_visual_embeds"], strict=True):
            plane[ranks] = shorter[done : done + len(kept)]
        done += len(kept)
    return {**given, "inputs_embeds": embeddings, **({"deepstack_visual_embeds": deep} if deep else {})}


@pytest.mark.parametrize("first", of_sites("input")[:3] + of_sites("input", "layer"))
def test_two_methods_at_one_site_are_refused_before_anything_is_hooked(first):
    model = FAMILIES[0].build(torch.float32)
    with pytest.raises(UnsupportedMethodError, match="both act at the input site"):
        vlmprune.apply(model, [make_method(first), make_method("divprune")])
    assert not model.model._forward_pre_hooks


def test_a_method_of_both_sites_takes_no_second_one_inside_the_language_model():
    with pytest.raises(UnsupportedMethodError, match="both act at the layer site"):
        vlmprune.apply(FAMILIES[0].build(torch.float32), [make_method("todre"), make_method("fastv")])
