"""HiRED's split of the budget over thumbnail and crops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from support import method_batches as build
from support.families.qwen2_vl import QWEN2_VL
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import ParameterError, UnknownNameError, UnsupportedMethodError
from vlmprune.methods import FasterVLM, HiRED
from vlmprune.methods.shared.tile_segments import tile_segments

parameters = st.fixed_dictionaries(
    {
        "alpha": st.floats(0, 1),
        "content": st.sampled_from(["count", "mass"]),
        "cells": st.sampled_from(["grid", "bands"]),
        "content_topk": st.one_of(st.none(), st.integers(1, 99)),
    }
)


@settings(max_examples=60, deadline=None)
@given(layout=build.layouts(tiled=True), parameters=parameters, seed=st.integers(0, 99), data=st.data())
def test_the_budget_is_exact_and_newlines_come_last(layout, parameters, seed, data):
    method = HiRED(keep=data.draw(st.integers(1, layout.total)), **parameters)
    batch = build.random_batch(method, [layout], seed)
    selection = method.select(batch)
    build.check_selection(selection, batch)
    *tiles, newlines = build.tiles_of(selection.kept, layout)
    sizes = build.tiles_of(torch.arange(layout.total), layout)
    assert newlines == max(0, method.keep - sum(sizes[:-1]))
    crops_full = sum(tiles[1:]) == sum(sizes[1:-1])
    assert tiles[0] == min(int((method.keep - newlines) * method.alpha), sizes[0]) or crops_full


@settings(max_examples=40, deadline=None)
@given(images=st.lists(build.layouts(), min_size=1, max_size=3), keep=st.floats(0.02, 1), parameters=parameters)
def test_faithful_never_keeps_more_than_its_budget(images, keep, parameters):
    method = HiRED(keep=keep, faithful=True, **parameters)
    batch = build.random_batch(method, images, 4)
    selection = method.select(batch)
    build.check_selection(selection, batch, counts=selection.counts)
    for layout, count in zip(images, selection.counts, strict=True):
        tiles = 1 + (layout.crops[0] * layout.crops[1] if layout.crops else 0)
        assert count <= max(1, int(tiles * layout.tile_grid[0] * layout.tile_grid[1] * keep))
        assert count <= method.budget(layout.total)


@pytest.mark.parametrize("keep", [0.1, 20])
def test_faithful_does_not_spend_what_padding_adds_to_the_official_budget(keep):
    layout = build.anyres_layout((2, 2), 6, 100, 300)
    method = HiRED(keep=keep, faithful=True)
    batch = build.random_batch(method, [layout], 4)
    first, last = method.vision_signals(batch.tower)
    # All content and all attention where the picture is, so that none of the official choice is lost in padding.
    for signal in (first, last):
        for tiles in batch.tile_vision[signal]:
            tiles.zero_()
            tiles[layout.tile[~layout.newline], (layout.row * 6 + layout.column)[~layout.newline]] = 1.0
        batch.vision[signal].uniform_(0.5, 1.0, generator=torch.Generator().manual_seed(0))
    content = method.content_scores(batch.vision[first].sum(-1), batch.layouts, tile_segments(batch.layouts))
    (official,) = method.official_tokens(batch, last, content)
    budget = method.budget(layout.total)
    assert len(official) > budget
    (kept,) = build.kept_per_image(method.select(batch))
    assert len(kept) == budget
    assert torch.isin(kept, official).all()
    scores = batch.vision[last].sum(-1)
    assert scores[kept].min() >= scores[official[~torch.isin(official, kept)]].max()


def corner_batch(method):
    """All content of the thumbnail lies in the upper right corner: the second of four crops, the first two bands."""
    layout = build.anyres_layout((2, 2), 4, 100, 100)
    batch = build.random_batch(method, [layout], 2)
    first, _ = method.vision_signals(batch.tower)
    row, column = layout.row, layout.column
    corner = (layout.tile == 0) & (row < 2) & (column >= 2)
    batch.vision[first][:] = torch.where(corner, 1.0, 0.0)[:, None]
    return layout, batch


def test_cells_are_rectangles_or_bands():
    by_grid = HiRED(keep=20, content="mass")
    layout, batch = corner_batch(by_grid)
    assert build.tiles_of(by_grid.select(batch).kept, layout) == [10, 0, 10, 0, 0, 0]
    by_band = HiRED(keep=20, content="mass", cells="bands")
    assert build.tiles_of(by_band.select(batch).kept, layout) == [10, 5, 5, 0, 0, 0]


def test_count_counts_the_highest():
    method = HiRED(keep=20, content_topk=6)
    layout, batch = corner_batch(method)
    # Four in the corner; the ties of the rest go to the first two tokens, in the first crop's cell.
    assert build.tiles_of(method.select(batch).kept, layout) == [10, 3, 7, 0, 0, 0]


def test_a_crop_that_is_full_leaves_its_share_to_the_others():
    method = HiRED(keep=60, content="mass")
    layout, batch = corner_batch(method)
    kept = build.tiles_of(method.select(batch).kept, layout)
    assert kept == [16, 10, 16, 9, 9, 0]


def test_without_content_crops_share_evenly():
    method = HiRED(keep=24, content="mass")
    layout, batch = corner_batch(method)
    first, _ = method.vision_signals(batch.tower)
    batch.vision[first][:] = 0
    assert build.tiles_of(method.select(batch).kept, layout) == [12, 3, 3, 3, 3, 0]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", True])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ParameterError, match="alpha"):
        HiRED(alpha=alpha)


def test_bad_choices_are_refused():
    with pytest.raises(UnknownNameError, match="'mass'"):
        HiRED(content="mas")
    with pytest.raises(UnknownNameError, match="cells"):
        HiRED(cells="quadrants")
    with pytest.raises(ParameterError, match="content_topk"):
        HiRED(content_topk=0)


def test_faithful_without_whole_tiles_says_so():
    method = HiRED(keep=20, faithful=True)
    _, batch = corner_batch(method)
    tokens_only = build.make_batch(method, batch.layouts, batch.features, batch.vision, build.WITH_CLS)
    with pytest.raises(UnsupportedMethodError, match="faithful=False"):
        method.select(tokens_only)


def test_an_image_without_tiles_keeps_its_best_tokens():
    """The official code for LLaVA-1.5: the highest sums over heads, `int(N * rate)` of them with `faithful`."""
    llava = LLAVA_CLIP_GQA
    model, inputs = llava.build(torch.float32), llava.inputs([[3, "A", 4, "B"], [2, "C", 5]], dtype=torch.float32)
    kept = {}
    for method in (HiRED(keep=0.26), HiRED(keep=0.26, faithful=True), FasterVLM(keep=0.26), FasterVLM(keep=9)):
        with torch.no_grad(), vlmprune.pruned(model, method):
            model(**inputs)
            kept[repr(method)] = [image.kept.tolist() for image in vlmprune.last_run(model).images]
    exact, faithful, as_exact, as_faithful = kept.values()
    assert exact == as_exact
    assert faithful == as_faithful
    assert len({tuple(image) for image in exact}) == 3


def test_a_family_without_crops_is_refused_and_the_others_are_named():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    with pytest.raises(
        UnsupportedMethodError, match=r"crops.*Families that have them: LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision\."
    ):
        vlmprune.apply(model, "globalcom2")
    assert "globalcom2" not in vlmprune.list_methods(model)


def test_a_family_with_images_of_any_size_is_refused():
    model = QWEN2_VL.build(torch.float32)
    with pytest.raises(
        UnsupportedMethodError,
        match=r"tiles of one size.*LLaVA, ViP-LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision, InternVL, Idefics3\.",
    ):
        vlmprune.apply(model, "hired")
