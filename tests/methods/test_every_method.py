"""What holds for every method that selects before the language model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import method_batches as build
from support.matrix import REQUIRED
from vlmprune.methods.needs import GRID, VIDEOS
from vlmprune.methods.registry import METHODS

INPUT_METHODS = [name for name, cls in METHODS.items() if cls.site == "input" and VIDEOS not in cls.needs]
ANY_LAYOUT = [name for name in INPUT_METHODS if GRID not in METHODS[name].needs]


def made(name, keep):
    """A method with its defaults, or with what it cannot do without."""
    return METHODS[name](keep=keep, **REQUIRED.get(name, {}))


QUICK = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("name", ANY_LAYOUT)
@QUICK
@given(
    images=st.lists(build.layouts(), min_size=1, max_size=3),
    keep=build.keeps,
    tower=build.towers,
    equal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_budgets_are_spent_exactly(name, images, keep, tower, equal, seed):
    method = made(name, keep)
    batch = build.random_batch(method, images, seed, tower, equal)
    build.check_selection(method.select(batch), batch)


@pytest.mark.parametrize("name", ANY_LAYOUT)
@QUICK
@given(images=st.lists(build.layouts(), min_size=2, max_size=3), keep=build.keeps, tower=build.towers)
def test_an_image_gives_the_same_alone_and_in_a_batch(name, images, keep, tower):
    method = made(name, keep)
    whole = build.random_batch(method, images, 7, tower)
    together = method.select(whole)
    for index in range(len(images)):
        alone = method.select(build.image_of(whole, method, index))
        assert torch.equal(alone.kept, together.kept.split(list(whole.budgets))[index])
        if together.features is not None:
            torch.testing.assert_close(alone.features, together.features.split(list(whole.budgets))[index])


@pytest.mark.parametrize("name", ANY_LAYOUT)
@pytest.mark.parametrize("tiled", [False, True], ids=["raster", "tiles"])
def test_one_token_and_all_tokens(name, tiled):
    layout = build.anyres_layout((2, 2), 4, 100, 150) if tiled else build.raster_layout(5, 6)
    for keep in (1, layout.total - 1, layout.total):
        method = made(name, keep)
        batch = build.random_batch(method, [layout], 3)
        build.check_selection(method.select(batch), batch)


@pytest.mark.parametrize("name", ["fastervlm", "vtc_cls", "hired"])
def test_ties_go_to_the_lowest_index(name):
    method = made(name, 6)
    batch = build.random_batch(method, [build.raster_layout(4, 4)], 0, equal=True)
    assert method.select(batch).kept.tolist() == list(range(6))


@pytest.mark.parametrize("name", INPUT_METHODS)
def test_half_precision_features_are_served(name):
    method = made(name, 0.3)
    batch = build.random_batch(method, [build.raster_layout(4, 4)], 5)
    half = replace(batch, features=batch.features.bfloat16())
    selection = method.select(half)
    assert selection.kept.numel() == sum(selection.counts)
    assert selection.features is None or selection.features.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name in ANY_LAYOUT if METHODS[name].merges])
@QUICK
@given(images=st.lists(build.layouts(), min_size=1, max_size=3), keep=build.keeps, tower=build.towers)
def test_groups_say_where_every_token_went(name, images, keep, tower):
    method = made(name, keep)
    batch = build.random_batch(method, images, 3, tower)
    selection = method.select(batch)
    kept = selection.kept.split(list(selection.counts))
    for groups, own in zip(selection.groups.split(list(batch.counts)), kept, strict=True):
        assert groups.min() >= -1
        assert groups.max() < len(own)
    assert selection.merge(batch.features).shape == selection.features.shape
