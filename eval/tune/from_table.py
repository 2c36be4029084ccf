"""The choice that a finished benchmark's own table allows, in the words of `vlmprune tune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmprune.eval.models.lower_resolution import LOWER_RESOLUTION
from vlmprune.eval.reports.summary import Row
from vlmprune.eval.run.cells import Cell

from .run import LEAST_ITEMS, Tuning, described
from .search import choose_from_table
from .targets import Target

DEFAULT_POINTS = 0.02
"""Accuracy that the closing sentence lets a method lose, where items are scored."""


def closing_choice(rows: Sequence[Row]) -> Tuning | None:
    """The cheapest row that loses at most two points of the items' mean score; without labels, 2 % of the answers.

    A part of the items is held out and confirms it. None where there is nothing to choose from: no unpruned row, no scores of
    items, fewer than ten of them, or no row that saves FLOPs and of which all are counted.
    """
    full = next((row for row in rows if row.is_full), None)
    if full is None:
        return None
    unlabelled = set(full.scores) == {"same_answer"}
    target = Target("same_answers") if unlabelled else Target("accuracy_drop", DEFAULT_POINTS)
    table = _Table(full)
    cells = []
    for row in rows:
        if not row.is_full and row.title != LOWER_RESOLUTION and row.flops.get("selection") is not None:
            cell = Cell.from_stored(row.result)
            if row.prefill_flops < full.prefill_flops and table.add(cell, row):
                cells.append(cell)
    if not cells or table.items < LEAST_ITEMS:
        return None
    return described(choose_from_table(table, cells, table.items, target), target, table)


class _Table:
    """Losses and costs of rows, by cell (see `Trial`)."""

    def __init__(self, full: Row) -> None:
        self.full, self.scores = full, _scores(full.result)
        self.items = len(self.scores or ())
        self._losses: dict[str, np.ndarray] = {}
        self._costs: dict[str, float] = {}

    def add(self, cell: Cell, row: Row) -> bool:
        """Take a row in; False where its items are not those of the unpruned model."""
        found = _scores(row.result)
        if not found or not self.scores or found.keys() != self.scores.keys():
            return False
        self._losses[cell.label] = np.array([self.scores[item] - found[item] for item in self.scores])
        self._costs[cell.label] = row.prefill_flops / self.full.prefill_flops
        return True

    def losses(self, cell: Cell, items: Sequence[int]) -> np.ndarray:
        return self._losses[cell.label][list(items)]

    def cost(self, cell: Cell) -> float:
        return self._costs[cell.label]

    def meets(self, cell: Cell, target: Target) -> bool:
        raise NotImplementedError("A table is asked for bounds of quality only.")

    def search_is_over(self) -> None:
        pass

    def speed_up(self, cell: Cell) -> float:
        raise NotImplementedError("A table is asked for bounds of quality only.")


def _scores(result: Mapping[str, Any]) -> dict[tuple[str, Any], float] | None:
    """Scores by task and item, more always better; None where an item has none."""
    found: dict[tuple[str, Any], float] = {}
    for name, task in result["tasks"].items():
        sign = 1.0 if task["higher_is_better"] else -1.0
        for sample in task["samples"]:
            if sample["score"] is None:
                return None
            found[name, sample["doc_id"]] = sign * sample["score"]
    return found
