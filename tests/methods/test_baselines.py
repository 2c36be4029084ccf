"""Random, uniform and pool."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import method_batches as build
from vlmprune.errors import ParameterError
from vlmprune.methods import Pool, Random, Uniform
from vlmprune.methods.baselines.pool import pooled_grid
from vlmprune.methods.baselines.uniform import even_grid, even_steps


def kept_of(method, rows, columns):
    batch = build.random_batch(method, [build.raster_layout(rows, columns)], 1)
    return method.select(batch).kept


def test_uniform_takes_every_second_row_and_column():
    assert kept_of(Uniform(keep=4), 4, 4).tolist() == [5, 7, 13, 15]


def test_uniform_without_a_grid_takes_even_steps():
    assert even_steps(10, 5).tolist() == [1, 3, 5, 7, 9]
    assert even_steps(7, 7).tolist() == list(range(7))


@given(count=st.integers(1, 300), data=st.data())
def test_even_steps_differ_by_one_at_most(count, data):
    budget = data.draw(st.integers(1, count))
    gaps = even_steps(count, budget).diff()
    assert budget == 1 or int(gaps.max() - gaps.min()) <= 1


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_uniform_spends_the_budget_in_rows_of_nearly_equal_length(rows, columns, data):
    budget = data.draw(st.integers(1, rows * columns))
    kept = even_grid(rows, columns, budget)
    assert len(kept.unique()) == budget
    lengths = torch.bincount(kept // columns)
    lengths = lengths[lengths > 0]
    assert int(lengths.max() - lengths.min()) <= 1


def test_random_depends_on_the_seed_alone():
    first, again, other = (kept_of(Random(keep=0.5, seed=seed), 6, 6) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_draws_every_token_about_equally_often():
    drawn = torch.zeros(16)
    for seed in range(400):
        drawn[kept_of(Random(keep=4, seed=seed), 4, 4)] += 1
    assert drawn.min() > 60
    assert drawn.max() < 145


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_random_refuses_a_bad_seed(seed):
    with pytest.raises(ParameterError, match="seed"):
        Random(seed=seed)


def test_pool_gives_the_means_of_the_cells():
    features = torch.arange(32.0).view(16, 2)
    method = Pool(keep=4)
    selection = method.select(build.make_batch(method, [build.raster_layout(4, 4)], features))
    grid = features.view(4, 4, 2)
    means = torch.stack(
        [grid[:2, :2].mean((0, 1)), grid[:2, 2:].mean((0, 1)), grid[2:, :2].mean((0, 1)), grid[2:, 2:].mean((0, 1))]
    )
    assert torch.allclose(selection.features, means)
    assert selection.kept.tolist() == [0, 2, 8, 10]


def test_pool_of_an_odd_grid_gives_overlapping_means():
    features = torch.arange(9.0)[:, None]
    method = Pool(keep=4)
    selection = method.select(build.make_batch(method, [build.raster_layout(3, 3)], features))
    assert selection.features.flatten().tolist() == [2.0, 3.0, 5.0, 6.0]


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_pool_stays_within_the_budget_and_keeps_its_indices_apart(rows, columns, data):
    budget = data.draw(st.integers(1, rows * columns))
    method = Pool(keep=budget)
    batch = build.random_batch(method, [build.raster_layout(rows, columns)], 2)
    selection = method.select(batch)
    build.check_selection(selection, batch, counts=selection.counts)
    assert 1 <= selection.counts[0] <= budget
    assert selection.features.isfinite().all()


def test_pool_keeps_the_shape_of_the_image():
    assert pooled_grid(24, 24, 64) == (8, 8)
    assert pooled_grid(8, 16, 32) == (4, 8)
