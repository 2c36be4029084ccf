"""FasterVLM and VTC-CLS on images that are cut in tiles."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import method_batches as build
from vlmprune.methods import VTCCLS, FasterVLM
from vlmprune.methods.batch import VisionSignal


@settings(max_examples=40, deadline=None)
@given(layout=build.layouts(tiled=True), seed=st.integers(0, 99), data=st.data())
def test_every_tile_keeps_the_same_number(layout, seed, data):
    method = FasterVLM(keep=data.draw(st.integers(1, layout.total)))
    batch = build.random_batch(method, [layout], seed)
    *tiles, newlines = build.tiles_of(method.select(batch).kept, layout)
    *sizes, newline_total = build.tiles_of(torch.arange(layout.total), layout)
    open_tiles = [kept for kept, size in zip(tiles, sizes, strict=True) if kept < size]
    assert not open_tiles or max(open_tiles) - min(open_tiles) <= 1
    assert not open_tiles or all(
        kept >= max(open_tiles) - 1
        for kept, size in zip(tiles, sizes, strict=True)
        if kept == size and size > max(open_tiles)
    )
    assert newlines == max(0, method.keep - sum(sizes)) <= newline_total


def test_the_best_of_each_tile_are_kept():
    layout = build.anyres_layout((1, 2), 4, 50, 100)
    method = FasterVLM(keep=9)
    batch = build.random_batch(method, [layout], 11)
    kept = method.select(batch).kept
    score = batch.vision[VisionSignal("cls_attention", 8)].mean(-1)
    for tile in range(3):
        members = ((layout.tile == tile) & ~layout.newline).nonzero().flatten()
        best = members[score[members].argsort(descending=True)[:3]].sort().values
        assert kept[torch.isin(kept, members)].tolist() == best.tolist()


def test_images_with_and_without_tiles_in_one_batch():
    images = [build.raster_layout(4, 4), build.anyres_layout((2, 2), 3, 90, 120), build.raster_layout(2, 3)]
    method = FasterVLM(keep=10)
    batch = build.random_batch(method, images, 5)
    build.check_selection(method.select(batch), batch)


def test_vtc_cls_sums_layers_and_equals_fastervlm_with_one():
    layout = build.raster_layout(6, 6)
    several, single, faster = VTCCLS(keep=9, start_layer=-4), VTCCLS(keep=9, start_layer=8), FasterVLM(keep=9)
    batch = build.random_batch(several, [layout], 3)
    assert [signal.layer for signal in batch.vision] == [6, 7, 8]
    summed = sum(values.mean(-1) for values in batch.vision.values())
    assert several.select(batch).kept.tolist() == summed.topk(9).indices.sort().values.tolist()
    assert single.select(batch).kept.tolist() == faster.select(batch).kept.tolist()
