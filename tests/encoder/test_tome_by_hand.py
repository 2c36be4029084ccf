"""ToMe in a model's tower, against the tower in plain loops."""

from itertools import pairwise

import pytest
import torch

import vlmprune
from support.deeper_tower import deeper_tower
from support.families import llava_next, llava_onevision, vip_llava
from support.plain_methods.tome import tome_tower
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED
from support.tower_ends import projected_rows
from vlmprune.patches.families.registry import find_family

ONE_TILE = [deeper_tower(case) for case in (LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED, *vip_llava.CASES)]
TILED = [deeper_tower(case) for case in (llava_next.CASES[0], *llava_onevision.CASES)]
ROWS = {"single": [[3, "A", 4]], "three rows": [[3, "A", 4], [2, "B", 1, "C", 6], [9, "D"]]}


def removed_by(method, model):
    """Tokens that each block removes."""
    family = find_family(model)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    counts = (patches, *method.plan(patches, family.tower_facts))
    return [before - after for before, after in pairwise(counts)]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", [*ONE_TILE, *TILED], ids=str)
@pytest.mark.parametrize("proportional", [True, False])
def test_full(family, rows, proportional):
    model = family.build(torch.float32)
    method = vlmprune.methods.ToMe(keep=0.45, proportional_attention=proportional)
    with torch.no_grad(), vlmprune.pruned(model, method):
        pixels, features = projected_rows(model, family.inputs(rows))
    adapter = find_family(model)
    for tile, rows_of_tile in zip(pixels, features, strict=True):
        states = tome_tower(adapter.vision_tower, tile[None], removed_by(method, model), proportional)
        expected = torch.cat([states[block].full()[-rows_of_tile.shape[0] :] for block in adapter.state_layers], -1)
        torch.testing.assert_close(rows_of_tile, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", ONE_TILE, ids=str)
@pytest.mark.parametrize("order", ["position", "official"])
@pytest.mark.parametrize("keep", [0.4, 5])
def test_merged(family, rows, order, keep):
    model = family.build(torch.float32)
    method = vlmprune.methods.ToMe(keep=keep, output="merged", order=order)
    with torch.no_grad(), vlmprune.pruned(model, method):
        pixels, features = projected_rows(model, family.inputs(rows))
        images = vlmprune.last_run(model).images
    adapter = find_family(model)
    cls = int(adapter.tower_facts.has_cls)
    for tile, merged, image in zip(pixels, features, images, strict=True):
        states = tome_tower(adapter.vision_tower, tile[None], removed_by(method, model))
        last = states[max(adapter.state_layers)]
        tokens = range(cls, len(last.values))
        if order == "position":
            tokens = sorted(tokens, key=lambda token: last.places[token])
        parts = []
        for block in adapter.state_layers:
            if states[block] is last:
                parts.append(torch.stack([last.values[token] for token in tokens]))
            else:
                whole = states[block].full()
                parts.append(torch.stack([whole[last.members[token]].mean(0) for token in tokens]))
        torch.testing.assert_close(merged, torch.cat(parts, -1), atol=2e-5, rtol=1e-4)
        assert image.kept.tolist() == sorted(last.places[token] - cls for token in tokens)
        for number, token in enumerate(tokens):
            group = (image.groups == number).nonzero().flatten().tolist()
            assert group == sorted(member - cls for member in last.members[token])
