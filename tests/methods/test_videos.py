"""Methods that serve videos, on the layouts of videos with and without a newline at their end."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.matrix import REQUIRED
from support.method_batches import check_selection, random_batch
from vlmprune.layout import raster_layout
from vlmprune.methods import InputMethod
from vlmprune.methods.baselines.uniform import even_frames
from vlmprune.methods.batch import Selection
from vlmprune.methods.needs import STILL_IMAGES, VIDEOS
from vlmprune.methods.registry import METHODS
from vlmprune.patches.families.llava_onevision import video_layout
from vlmprune.patches.prefill.scored_items import choose_among, frame_shares, scored_items, visual_budget

SERVING = [name for name, cls in METHODS.items() if cls.site == "input" and STILL_IMAGES not in cls.needs]
sizes = st.integers(1, 5)


@st.composite
def videos(draw):
    """A video of several frames, as Qwen-VL or as OneVision has it."""
    frames = draw(st.integers(2, 6))
    if draw(st.booleans()):
        return video_layout(frames, draw(sizes))
    return raster_layout(draw(sizes), draw(sizes), frames)


@pytest.mark.parametrize("name", SERVING)
@settings(max_examples=40, deadline=None)
@given(layouts=st.lists(videos(), min_size=1, max_size=3), keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 90)))
def test_budgets_are_met_and_newlines_stay(name, layouts, keep):
    method = METHODS[name](keep=keep, **REQUIRED.get(name, {}))
    batch = random_batch(method, [*layouts, raster_layout(2, 3)], 5)
    budgets = tuple(map(partial(visual_budget, method), batch.layouts, batch.modalities))
    batch = replace(batch, budgets=budgets)
    selection = choose_among(method, batch, scored_items(method, batch.layouts, batch.modalities, budgets))
    if not method.merges:
        check_selection(selection, batch)
    for kept, layout in zip(selection.kept.split(list(selection.counts)), batch.layouts, strict=True):
        assert (kept.diff() > 0).all()
        assert layout.frames == 1 or bool(torch.isin(layout.newline.nonzero().flatten(), kept).all())
    if selection.groups is not None:
        for groups, count in zip(selection.groups.split(list(batch.counts)), selection.counts, strict=True):
            assert (groups >= -1).all()
            assert (groups < count).all()
        assert selection.features.shape[0] == len(selection.kept) == selection.merge(batch.features).shape[0]


@given(frames=st.integers(1, 9), budget=st.integers(1, 90))
def test_frames_share_a_budget_evenly(frames, budget):
    shares = frame_shares(frames, budget)
    assert sum(shares) == budget
    assert max(shares) - min(shares) <= 1


@given(frames=st.integers(1, 6), rows=sizes, columns=sizes, data=st.data())
def test_uniform_gives_every_frame_its_share(frames, rows, columns, data):
    budget = data.draw(st.integers(1, frames * rows * columns))
    kept = even_frames(frames, rows, columns, budget)
    assert len(kept.unique()) == budget
    shares = torch.bincount(kept // (rows * columns), minlength=frames)
    assert int(shares.max() - shares.min()) <= 1


@dataclass(frozen=True, kw_only=True)
class Folded(InputMethod):
    """Keeps the first tokens of an item, and adds every other to one of them."""

    by_frame: bool = False

    name: ClassVar[str] = "folded"
    needs: ClassVar[frozenset] = frozenset()
    merges: ClassVar[bool] = True

    @property
    def frame_by_frame(self):
        return self.by_frame

    def select(self, batch):
        starts = torch.tensor(batch.budgets).cumsum(0) - torch.tensor(batch.budgets)
        groups = [torch.arange(count) % budget for count, budget in zip(batch.counts, batch.budgets, strict=True)]
        into = torch.cat([own + start for own, start in zip(groups, starts, strict=True)])

        def merge(values):
            return values.new_zeros(sum(batch.budgets), values.shape[1]).index_add_(0, into, values)

        kept = torch.cat([torch.arange(budget) for budget in batch.budgets])
        return Selection(kept, batch.budgets, merge(batch.features), merge, torch.cat(groups))


@pytest.mark.parametrize("by_frame", [False, True], ids=["video", "frame"])
@pytest.mark.parametrize("needs", [frozenset(), frozenset({VIDEOS})], ids=["images too", "videos alone"])
def test_groups_and_values_are_those_of_the_whole_batch(by_frame, needs, monkeypatch):
    """What a token went into is named among all kept tokens of its video, newlines and untouched images too."""
    monkeypatch.setattr(Folded, "needs", needs)
    method = Folded(keep=0.4, by_frame=by_frame)
    layouts = [video_layout(3, 2), raster_layout(2, 3), raster_layout(2, 2, 4), video_layout(2, 3)]
    batch = random_batch(method, layouts, 3)
    budgets = tuple(map(partial(visual_budget, method), batch.layouts, batch.modalities))
    batch = replace(batch, budgets=budgets)
    selection = choose_among(method, batch, scored_items(method, batch.layouts, batch.modalities, budgets))
    assert selection.counts == budgets
    parts = [values.split(list(batch.counts)) for values in (batch.features, selection.groups)]
    kept = [values.split(list(selection.counts)) for values in (selection.kept, selection.features)]
    for features, groups, places, values in zip(*parts, *kept, strict=True):
        assert groups.min() >= 0
        summed = torch.zeros_like(values).index_add_(0, groups, features)
        torch.testing.assert_close(values, summed)
        assert groups[places].tolist() == list(range(len(places)))
    torch.testing.assert_close(selection.merge(batch.features), selection.features)
