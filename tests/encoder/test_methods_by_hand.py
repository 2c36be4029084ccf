"""Every encoder method in a model's tower, against the tower in plain loops."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import vlmprune
from support.deeper_tower import deeper_tower
from support.families import llava_next, llava_onevision, vip_llava
from support.plain_methods.crossget import crossget
from support.plain_methods.expedite import expedite
from support.plain_methods.mctf import mctf
from support.plain_methods.pitome import pitome
from support.plain_methods.reduced_tower import reduced_tower
from support.plain_methods.token_transforming import token_transforming
from support.plain_methods.zero_tprune import zero_tprune
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED
from support.tower_ends import projected_rows
from vlmprune.methods import MCTF, CrossGET, Expedite, PiToMe, TokenTransforming, ZeroTPrune
from vlmprune.patches.families.registry import find_family

SINGLE, THREE = [[3, "A", 4]], [[3, "A", 4], [2, "B", 1, "C", 6], [9, "D"]]
CLIP, SIGLIP = deeper_tower(LLAVA_CLIP_GQA), deeper_tower(LLAVA_SIGLIP_TIED)
OTHERS = [deeper_tower(case) for case in (*vip_llava.CASES, llava_next.CASES[0], llava_onevision.CASES[0])]
FULL = [(CLIP, SINGLE), (CLIP, THREE), (SIGLIP, THREE), *((other, SINGLE) for other in OTHERS)]
MERGED = [(CLIP, THREE, "position"), (CLIP, SINGLE, "official"), (SIGLIP, THREE, "official")]


def llava_schedule(block, blocks):
    return "bsm" if block < 13 / 24 * blocks else "pitome"


def deit_schedule(block, blocks):
    return "bsm_pitome" if block < blocks / 2 else "pitome"


LAYERS = {"layers": (0, 1, 2)}
DEIT = {"schedule": "deit", "margin": 0.75, "after": "attention", "metric": "keys", "weights": "size"}

# By method and what is special: the method without its budget, and the plain reduction.
PLAIN = {
    "expedite": (Expedite(clusters=(3, 4), layer=1), expedite((3, 4))),
    "expedite-l2": (Expedite(clusters=(4, 2), layer=2, tau=0.005, k=3, weights="l2"), expedite((4, 2), 0.005, 3, "l2")),
    "pitome": (PiToMe(ratio=0.8), pitome(llava_schedule, 0.9)),
    "pitome-deit": (PiToMe(keep=0.5, **DEIT), pitome(deit_schedule, 0.75, keys=True, by_size=True)),
    "crossget": (CrossGET(keep=0.5), crossget("llava")),
    "crossget-clip": (CrossGET(r=3, variant="clip"), crossget("clip")),
    "crossget-matching": (CrossGET(keep=0.5, variant="matching"), crossget("matching")),
    "mctf": (MCTF(keep=0.5, **LAYERS), mctf(one_step_ahead=True)),
    "mctf-precise": (MCTF(keep=0.6, mode="precise", pooling="size", **LAYERS), mctf(False, "size")),
    "mctf-after": (MCTF(r=5, mode="after_block", **LAYERS), mctf(one_step_ahead=False)),
    "zero_tprune": (ZeroTPrune(keep=0.6, redundant=2, iterations=3), zero_tprune(2, 3)),
    "token_transforming": (TokenTransforming(keep=0.6), token_transforming(0.1)),
    "token_transforming-row": (TokenTransforming(keep=0.6, tau=0.3, mode="row"), token_transforming(0.3, "row")),
}


def plain_outputs(model, method, reduce, tile):
    """Outputs of all blocks of the plain tower."""
    family = find_family(model)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    counts = (patches, *method.plan(patches, family.tower_facts))
    removed = [before - after for before, after in pairwise(counts)]
    assert sum(removed) > 0
    cross = method.trailing(family.tower_facts) > 0
    return reduced_tower(family.vision_tower, tile[None], removed, reduce, method.place, method.proportional, cross)


def shown(value):
    """The id of a parameter."""
    return f"{len(value)} rows" if isinstance(value, list) else str(value)


def tolerance(name):
    """Soft k-means makes roundings larger from round to round."""
    return {"atol": 5e-3, "rtol": 5e-3} if name.startswith("expedite") else {"atol": 1e-4, "rtol": 1e-3}


@pytest.mark.parametrize(("family", "rows"), FULL, ids=shown)
@pytest.mark.parametrize("name", PLAIN)
def test_full(name, family, rows):
    model, (method, reduce) = family.build(torch.float32), PLAIN[name]
    adapter = find_family(model)
    with torch.no_grad(), vlmprune.pruned(model, method):
        pixels, features = projected_rows(model, family.inputs(rows))
    for tile, rows_of_tile in zip(pixels, features, strict=True):
        outputs = plain_outputs(model, method, reduce, tile)
        expected = torch.cat([outputs[block].full[-len(rows_of_tile) :] for block in adapter.state_layers], -1)
        torch.testing.assert_close(rows_of_tile, expected, **tolerance(name))


@pytest.mark.parametrize(("family", "rows", "order"), MERGED, ids=shown)
@pytest.mark.parametrize("name", PLAIN)
def test_merged(name, family, rows, order):
    model, (method, reduce) = family.build(torch.float32), PLAIN[name]
    if method.keep == 0.6:
        method = replace(method, keep=0.4)
    method = replace(method, output="merged", order=order)
    with torch.no_grad(), vlmprune.pruned(model, method):
        pixels, features = projected_rows(model, family.inputs(rows))
        images = vlmprune.last_run(model).images
    adapter = find_family(model)
    cls = int(adapter.tower_facts.has_cls)
    for tile, merged, image in zip(pixels, features, images, strict=True):
        last = plain_outputs(model, method, reduce, tile)[max(adapter.state_layers)]
        tokens = range(cls, len(last.values))
        if order == "position":
            tokens = sorted(tokens, key=lambda token: last.places[token])
        torch.testing.assert_close(merged, last.values[list(tokens)], **tolerance(name))
        assert image.kept.tolist() == sorted(last.places[token] - cls for token in tokens)
