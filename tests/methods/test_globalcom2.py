"""GlobalCom2's crop ratios, newlines and orders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import method_batches as build
from vlmprune.errors import BudgetError, ParameterError, UnknownNameError
from vlmprune.methods import GlobalCom2
from vlmprune.methods.input.globalcom2_scores import guide


@settings(max_examples=60, deadline=None)
@given(layout=build.layouts(tiled=True), tower=build.towers, seed=st.integers(0, 99), data=st.data())
def test_the_budget_is_exact_and_newlines_are_kept(layout, tower, seed, data):
    method = GlobalCom2(keep=data.draw(st.integers(1, layout.total)))
    batch = build.random_batch(method, [layout], seed, tower)
    selection = method.select(batch)
    build.check_selection(selection, batch)
    sizes = build.tiles_of(torch.arange(layout.total), layout)
    *tiles, newlines = build.tiles_of(selection.kept, layout)
    assert newlines == max(min(sizes[-1], method.keep // 2), method.keep - sum(sizes[:-1]))
    assert abs(tiles[0] - sizes[0] * (method.keep - newlines) / sum(sizes[:-1])) <= 0.5


@settings(max_examples=40, deadline=None)
@given(layout=build.layouts(tiled=True), keep=st.floats(0.05, 0.6), seed=st.integers(0, 99))
def test_the_official_order_holds_the_same_patches(layout, keep, seed):
    by_position = GlobalCom2(keep=keep, faithful=True)
    official = GlobalCom2(keep=keep, faithful=True, order="official")
    batch = build.random_batch(by_position, [layout], seed)
    ids = torch.arange(layout.total)[:, None].float()
    batch = build.make_batch(by_position, [layout], ids, batch.vision, build.WITH_CLS)
    kept = by_position.select(batch)
    patches = kept.kept[~layout.newline[kept.kept]].tolist()
    selection = official.select(batch)
    build.check_selection(selection, batch, counts=selection.counts)
    order = selection.features.flatten().long()
    assert sorted(order[~layout.newline[order]].tolist()) == patches
    if bool(layout.newline.any()):
        rows = layout.crops[0] * layout.tile_grid[0]
        assert int(layout.newline[order].sum()) == rows
        assert layout.newline[order[-1]]


def test_the_official_order_without_room_for_its_newlines_is_refused():
    layout = build.anyres_layout((1, 2), 4, 60, 200)
    method = GlobalCom2(keep=1.0, faithful=True, order="official")
    with pytest.raises(BudgetError, match="smaller keep"):
        method.select(build.random_batch(method, [layout], 0, equal=True))


def bright_crop(layout, value):
    scores = torch.zeros(layout.total)
    scores[(layout.tile == 0) & (layout.row < 2) & (layout.column >= 2)] = value
    return scores


def test_the_crop_that_the_thumbnail_prefers_keeps_more():
    layout = build.anyres_layout((2, 2), 4, 100, 100)
    boost, view = guide(bright_crop(layout, 100.0), layout, temperature=10.0)
    assert boost.tolist() == pytest.approx([-0.25, 0.75, -0.25, -0.25], abs=1e-6)
    assert view[(layout.tile == 2) & ~layout.newline].mean() > 50
    assert view[(layout.tile == 3) & ~layout.newline].max() < 15
    method = GlobalCom2(keep=40)
    batch = build.random_batch(method, [layout], 3)
    (signal,) = batch.vision
    batch.vision[signal][:] = bright_crop(layout, 100.0)[:, None]
    # 8 newlines; of 32 patches the thumbnail keeps 32 / 5, the second crop 7 times as many as the others.
    assert build.tiles_of(method.select(batch).kept, layout)[0] == 6
    assert build.tiles_of(method.select(batch).kept, layout)[-1] == 8
    counts = build.tiles_of(method.select(batch).kept, layout)[1:-1]
    assert sum(counts) == 26
    assert counts[1] == max(counts)


def test_few_newlines_are_spread_over_the_rows():
    layout = build.anyres_layout((2, 2), 4, 100, 100)
    method = GlobalCom2(keep=8)
    kept = method.select(build.random_batch(method, [layout], 3)).kept
    rows = layout.newline.nonzero().flatten().tolist()
    assert [rows.index(token) for token in kept.tolist() if token in rows] == [1, 3, 5, 7]


def test_without_cls_the_odd_tokens_of_a_tile_win():
    layout = build.anyres_layout((1, 2), 4, 100, 200, newlines=False)
    features = torch.ones(layout.total, 8)
    odd = torch.tensor([3, 9])
    features[odd] = torch.tensor([1.0, -1.0] * 4)
    method = GlobalCom2(keep=12)
    batch = build.make_batch(method, [layout], features, tower=build.WITHOUT_CLS)
    assert torch.isin(odd, method.select(batch).kept).all()


def test_bad_parameters_are_refused():
    with pytest.raises(ParameterError, match="temperature"):
        GlobalCom2(temperature=0)
    with pytest.raises(UnknownNameError, match="order"):
        GlobalCom2(order="score")
    with pytest.raises(ParameterError, match="faithful"):
        GlobalCom2(order="official")
