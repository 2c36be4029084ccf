"""Selections made inside a model equal the methods' own functions on what the unpatched model gives."""

import pytest
import torch

import vlmprune
from support.families.anyres_by_hand import batch_by_hand, check_seen
from support.families.llava_next import LLAVA_NEXT
from support.families.llava_onevision import LLAVA_ONEVISION
from vlmprune.methods import VTCCLS, DivPrune, FasterVLM, GlobalCom2, HiRED, ToDRE
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.needs import WHOLE_TILES

NEXT = (
    LLAVA_NEXT,
    [[3, "A", 4], [2, "small", 1, "large", 3], [5, "square"]],
    [3, 3, 5, 5],
    TowerFacts(layers=3, feature_layer=1, has_cls=True, heads=4),
)
ONEVISION = (
    LLAVA_ONEVISION,
    [[3, "A", 4], [2, "small", 1, "large", 3], [5, "wide"]],
    [7, 2, 3, 3],
    TowerFacts(layers=3, feature_layer=2, has_cls=False, heads=4),
)
METHODS = [
    HiRED(keep=0.3),
    HiRED(keep=0.3, content="mass"),
    HiRED(keep=11, cells="bands", alpha=0.2),
    HiRED(keep=0.4, faithful=True),
    GlobalCom2(keep=0.3),
    GlobalCom2(keep=12, temperature=2.0),
    GlobalCom2(keep=0.3, faithful=True),
    GlobalCom2(keep=0.2, faithful=True, order="official"),
    FasterVLM(keep=0.3),
    VTCCLS(keep=0.3, start_layer=0),
    DivPrune(keep=0.3),
    ToDRE(keep=0.3, relevance=False),
]


def pruned_call(model, inputs, method, monkeypatch):
    """Run a prefill; return what the method saw, what it chose, and the kept tokens of every image."""
    seen, cls = [], type(method)
    original = cls.select

    def select(self, batch):
        seen.append((batch, original(self, batch)))
        return seen[-1][1]

    monkeypatch.setattr(cls, "select", select)
    with torch.no_grad(), vlmprune.pruned(model, method):
        model(**inputs)
        kept = [image.kept for image in vlmprune.last_run(model).images]
    monkeypatch.setattr(cls, "select", original)
    [(batch, selection)] = seen
    return batch, selection, kept


def check(model, inputs, tiles, tower, method, monkeypatch, **given):
    expected = batch_by_hand(model, inputs, tiles, method, tower, **given)
    batch, selection, kept = pruned_call(model, inputs, method, monkeypatch)
    check_seen(batch, expected, WHOLE_TILES in method.needs)
    by_hand = method.select(expected)
    assert by_hand.counts == selection.counts
    assert [image.tolist() for image in kept] == [image.tolist() for image in by_hand.kept.split(list(by_hand.counts))]
    if by_hand.features is not None:
        torch.testing.assert_close(selection.features, by_hand.features)


@pytest.mark.parametrize("setting", [NEXT, ONEVISION], ids=["next", "onevision"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_engine_equals_the_method_by_hand(method, setting, monkeypatch):
    case, rows, tiles, tower = setting
    check(case.build(torch.float32), case.inputs(rows), tiles, tower, method, monkeypatch)


@pytest.mark.parametrize("method", [HiRED(keep=0.3), GlobalCom2(keep=0.3), FasterVLM(keep=5)], ids=repr)
def test_prompts_with_several_images_of_onevision_get_one_tile_each(method, monkeypatch):
    model, inputs = LLAVA_ONEVISION.build(torch.float32), LLAVA_ONEVISION.inputs([[2, "A", 3, "B"], [4, "A"]])
    ids = inputs["input_ids"]
    cut, shared = LLAVA_ONEVISION.tokens("A"), 26
    rows = []
    for row, counts in ((ids[0], [shared, shared]), (ids[1], [cut])):
        text = row[(row != model.config.image_token_id) & (row != 0)]
        rows.append(torch.cat([text, torch.full((sum(counts),), model.config.image_token_id)]))
    width = max(map(len, rows))
    inputs["input_ids"] = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    inputs["batch_num_images"] = torch.tensor([2, 1])
    tower = ONEVISION[-1]
    given = {"batch_num_images": inputs["batch_num_images"]}
    check(model, inputs, [1, 1, 7], tower, method, monkeypatch, **given)
    with torch.no_grad(), vlmprune.pruned(model, method):
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        images = vlmprune.last_run(model).images
    assert generated.shape == (2, width + 3)
    assert [(image.batch_index, image.total) for image in images] == [(0, shared), (0, shared), (1, cut)]
