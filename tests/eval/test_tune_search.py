"""The search of `vlmprune tune` on a made-up grid of which everything is known."""

from __future__ import annotations

import numpy as np
import pytest

from vlmprune.errors import ParameterError
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.tune.search import OutOfTime, loss_interval, search
from vlmprune.eval.tune.targets import Target

KEEPS = (0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05)
ITEMS = 500


class Grid:
    """Losses of 16 methods at seven budgets on 500 items, correlated as answers are: an item lost early stays lost."""

    def __init__(self, seed: int, most: float = float("inf")) -> None:
        generator = np.random.default_rng(seed)
        self.ability = {f"m{number}": 0.6 + 0.1 * number for number in range(16)}
        hardness = generator.random(ITEMS)
        self.table = {
            (name, keep): (hardness + 0.1 * generator.standard_normal(ITEMS) > 1.05 - 0.05 / (keep * ability)).astype(
                float
            )
            for name, ability in self.ability.items()
            for keep in KEEPS
        }
        self.known: set[tuple[str, float, int]] = set()
        self.most, self.kept_back = most, 0

    def losses(self, cell, items):
        fresh = {(cell.method, cell.keep, item) for item in items} - self.known
        if len(self.known) + len(fresh) > self.most:
            raise OutOfTime
        self.known |= fresh
        return self.table[cell.method, cell.keep][list(items)]

    def cost(self, cell):
        return cell.keep

    def meets(self, cell, target):
        return cell.keep <= target.value

    def search_is_over(self):
        self.most += self.kept_back

    @property
    def cells(self):
        return {name: [Cell(name, keep) for keep in KEEPS] for name in self.ability}


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_near_the_best_of_the_grid_for_a_quarter_of_its_price(seed):
    grid, target = Grid(seed), Target("kv_share", 0.2)
    choice = search(grid, grid.cells, ITEMS, target, seed)
    best = min(grid.table[name, 0.18].mean() for name in grid.ability)
    assert choice.cell.keep == 0.18
    assert grid.table[choice.cell.method, 0.18].mean() <= best + 0.02
    assert len(grid.known) <= 0.25 * len(grid.table) * ITEMS


@pytest.mark.parametrize("seed", range(6))
def test_a_bound_of_quality_is_met_cheaply_and_confirmed_on_other_items(seed):
    grid, target = Grid(seed), Target("same_answers", 0.85)
    choice = search(grid, grid.cells, ITEMS, target, seed)
    cheapest = min(keep for (_, keep), losses in grid.table.items() if losses.mean() <= target.loss)
    assert choice.confirmed
    assert choice.loss <= target.loss
    assert grid.table[choice.cell.method, choice.cell.keep].mean() <= target.loss + 0.02
    assert KEEPS.index(choice.cell.keep) >= KEEPS.index(cheapest) - 1
    assert choice.held_out == 150
    assert len(grid.known) <= 0.25 * len(grid.table) * ITEMS


def test_what_cannot_be_met_is_said():
    grid = Grid(0)
    choice = search(grid, grid.cells, ITEMS, Target("same_answers", 1.0))
    assert choice.cell is None or not choice.confirmed


@pytest.mark.parametrize("target", [Target("kv_share", 0.2), Target("same_answers", 0.8)])
@pytest.mark.parametrize("kept_back", [150, 0])
def test_out_of_time_the_best_so_far_is_named(target, kept_back):
    grid = Grid(0, most=16 * 16 + 300)
    grid.kept_back = kept_back
    choice = search(grid, grid.cells, ITEMS, target)
    assert choice.out_of_time
    assert choice.cell is not None
    assert choice.held_out == kept_back
    assert choice.loss > 0 or not target.is_quality
    assert kept_back or not choice.confirmed


def test_measured_again_it_costs_nothing_and_chooses_the_same():
    grid, target = Grid(1), Target("same_answers", 0.85)
    first = search(grid, grid.cells, ITEMS, target)
    grid.most = len(grid.known)
    assert search(grid, grid.cells, ITEMS, target) == first


def test_no_loss_seen_is_not_no_loss():
    low, high = loss_interval(np.zeros(20))
    assert low < 0 < high
    assert 0.1 < high < 0.2


@pytest.mark.parametrize(
    ("kind", "value"), [("same_answers", 0.0), ("same_answers", 1.5), ("kl", 0), ("ttft_speedup", 1.0), ("kv_share", 2)]
)
def test_targets_that_make_no_sense_are_refused(kind, value):
    with pytest.raises(ParameterError, match=f"{kind}="):
        Target(kind, value)
