"""Successive halving over methods, bisection over budgets, and a confirmation on items that the search never saw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vlmprune.eval.accuracy.paired_intervals import quantile
from vlmprune.eval.run.cells import Cell

from .targets import Target

HELD_OUT = 0.3
FIRST_ITEMS = 32
FIRST_SHARE = 5
LEAST_ITEMS = 10
FINALISTS = 4
FINALIST_SHARE = 4
MIDDLE = 0.25


class OutOfTime(Exception):
    """The time given is used up; raised by a trial before it measures."""


class Trial(Protocol):
    """What the search can ask for. A value that was measured before costs nothing."""

    def losses(self, cell: Cell, items: Sequence[int]) -> np.ndarray:
        """What each item loses against the unpruned model, float `[items]`; negative where it gains."""

    def cost(self, cell: Cell) -> float:
        """FLOPs to the first token, or what else is to be small, as a share of the unpruned model's."""

    def meets(self, cell: Cell, target: Target) -> bool:
        """Whether the cell meets a bound of cost."""

    def search_is_over(self) -> None:
        """The confirmation begins, for which some of the time given was kept back."""


@dataclass(frozen=True)
class Choice:
    """What the search ended with.

    Attributes:
        cell: the choice; None where nothing meets the target.
        cost: its cost as a share of the unpruned model's.
        loss: mean loss on the items held out, and `interval` its 95 % interval.
        confirmed: whether the loss on the items held out meets the target; with a bound of cost, whether that is met.
        sure: whether the whole interval meets it.
        searched: items of the search.
        held_out: items of the confirmation; 0 where there was no time for it, and `loss` is that of the search.
        tried: cells that were measured.
        out_of_time: whether the search was cut short.
    """

    cell: Cell | None
    cost: float
    loss: float
    interval: tuple[float, float]
    confirmed: bool
    sure: bool
    searched: int
    held_out: int
    tried: int
    out_of_time: bool


def loss_interval(losses: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean loss, with one item added that loses all and one that gains all (see `task_moments`).

    The largest of the losses stands for all, 1 where they lie between -1 and 1.
    """
    scale = (
        max(1.0, float(np.abs(losses).max()))
        if float(np.abs(losses).max()) > 1 or _is_count(losses)
        else float(np.abs(losses).max())
    )
    total = len(losses) + 2
    mean = float(losses.sum()) / total
    spread = (float((losses**2).sum()) + 2 * scale**2) / total - mean**2
    width = quantile(0.95) * float(np.sqrt(spread / total))
    return mean - width, mean + width


def _is_count(losses: np.ndarray) -> bool:
    return bool(np.isin(losses, (-1.0, 0.0, 1.0)).all())


def search(
    trial: Trial,
    cells: Mapping[str, Sequence[Cell]],
    items: int,
    target: Target,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Choice:
    """Find the cheapest cell that meets a bound of quality, or the best one that meets a bound of cost.

    All methods start at their middle budget (or the largest that meets the bound of cost) on few items; each round doubles the
    items and drops the worse half down to a quarter of all (at least four), with a bound of cost also those that paired
    statistics tell from the best. With a bound of quality the budgets of those that are left are searched, as far as they can
    be cheaper than what meets it already. Candidates are then confirmed on the items held out, the cheapest (or best) first.

    Args:
        trial: measures.
        cells: by method, at most budgets.
        items: how many there are.
        target: the bound.
        seed: of the order of items.
        on_progress: is told what is done.
    """
    held, seen = _split(items, seed)
    run = _Search(trial, cells, seen, held, target, on_progress)
    try:
        run.halve()
        run.search_budgets()
    except OutOfTime:
        run.out_of_time = True
    trial.search_is_over()
    return run.confirm()


def choose_from_table(trial: Trial, cells: Sequence[Cell], items: int, target: Target, seed: int = 0) -> Choice:
    """The cheapest of cells that were all measured on all items and meet a bound of quality, confirmed as `search` does.

    What meets it is decided on the same share of the items as there, and confirmed on the rest.
    """
    held, seen = _split(items, seed)
    run = _Search(trial, {cell.label: [cell] for cell in cells}, seen, held, target, lambda text: None)
    for cell in cells:
        loss = float(run.losses(cell, seen).mean())
        if loss <= target.loss:
            run.candidates[cell.label] = (cell, loss)
    return run.confirm()


def _split(items: int, seed: int) -> tuple[list[int], list[int]]:
    """Items held out, and those of the search."""
    order = list(range(items))
    random.Random(seed).shuffle(order)
    held = order[: max(1, round(HELD_OUT * items))]
    return held, order[len(held) :]


class _Search:
    def __init__(
        self,
        trial: Trial,
        cells: Mapping[str, Sequence[Cell]],
        seen: Sequence[int],
        held: Sequence[int],
        target: Target,
        on_progress: Callable[[str], None],
    ) -> None:
        self.trial, self.seen, self.held, self.target, self.on_progress = trial, seen, held, target, on_progress
        self.cells = {title: sorted(group, key=_size, reverse=True) for title, group in cells.items() if group}
        self.alive = list(self.cells)
        self.finalists = max(FINALISTS, -(-len(self.cells) // FINALIST_SHARE))
        self.out_of_time = False
        self.means: dict[str, float] = {}
        self.candidates: dict[str, tuple[Cell, float]] = {}
        self.promising: dict[str, tuple[Cell, float]] = {}
        self.tried: set[str] = set()
        self.measured: dict[str, np.ndarray] = {}

    def losses(self, cell: Cell, items: Sequence[int]) -> np.ndarray:
        found = self.trial.losses(cell, items)
        self.tried.add(cell.label)
        self.measured[cell.label] = found
        return found

    def first_cell(self, title: str) -> Cell | None:
        """Where a method starts: at its middle budget, or at the largest that meets the bound of cost."""
        group = self.cells[title]
        if self.target.is_quality:
            return min(group, key=lambda cell: abs(_size(cell) - MIDDLE))
        return next((cell for cell in group if self.trial.meets(cell, self.target)), None)

    def halve(self) -> None:
        start = {title: cell for title in self.alive if (cell := self.first_cell(title)) is not None}
        self.alive = list(start)
        count = min(FIRST_ITEMS, max(len(self.seen) // FIRST_SHARE, LEAST_ITEMS), len(self.seen))
        while self.alive:
            found = {}
            for title in self.alive:
                found[title] = self.losses(start[title], self.seen[:count])
                mean = float(found[title].mean())
                if not self.target.is_quality or mean <= self.target.loss:
                    self.promising[title] = (start[title], mean)
            cost = {title: self.trial.cost(start[title]) for title in self.alive}
            if self.target.is_quality:
                # A method that costs more than it saves is no answer to "as cheap as can be".
                self.alive = [title for title in self.alive if cost[title] < 1.0] or self.alive
            self.means = {title: float(found[title].mean()) for title in self.alive}
            allowed = self.target.loss if self.target.is_quality else -math.inf
            over = {title: max(self.means[title], allowed) for title in self.alive}
            by_loss = sorted(self.alive, key=lambda title: (self.means[title], cost[title]))
            by_cost = sorted(self.alive, key=lambda title: (over[title], cost[title]))
            # The least loss promises the smallest budget, and meeting the bound at little cost is what is asked for.
            ranked = list(dict.fromkeys(title for pair in zip(by_loss, by_cost, strict=True) for title in pair))
            best = by_loss[0]
            told = {title: loss_interval(found[title] - found[best])[0] > 0 for title in ranked}
            # What loses more at this budget may still be the cheapest that meets a bound of quality at a larger one.
            keeps = [title for title in ranked if self.target.is_quality or not told[title]]
            self.on_progress(f"{count} items, {len(self.alive)} methods, best so far {start[best].label}")
            wanted = max(self.finalists, len(self.alive) // 2)
            self.alive = keeps[:wanted]
            if not self.target.is_quality:
                self.candidates = {title: (start[title], self.means[title]) for title in self.alive}
            if count == len(self.seen) or (len(self.alive) == 1 and self.target.is_quality):
                break
            count = min(2 * count, len(self.seen))

    def search_budgets(self) -> None:
        """Bisection for the smallest budget of every finalist that meets the bound of quality."""
        if not self.target.is_quality:
            return
        for title in self.alive[: self.finalists]:
            group = self.cells[title]
            low, high = 0, len(group) - 1
            while low <= high:
                middle = (low + high) // 2
                cheapest = min((self.trial.cost(cell) for cell, _ in self.candidates.values()), default=math.inf)
                if self.trial.cost(group[middle]) >= cheapest:
                    low = middle + 1
                    continue
                loss = self.loss_until_clear(group[middle])
                self.on_progress(f"{group[middle].label}: mean loss {loss:.3g}")
                if loss <= self.target.loss:
                    self.candidates[group[middle].label] = (group[middle], loss)
                    low = middle + 1
                else:
                    high = middle - 1

    def loss_until_clear(self, cell: Cell) -> float:
        """Mean loss on as many items of the search as it takes to tell it from the bound, at most all."""
        count = min(4 * FIRST_ITEMS, len(self.seen))
        while True:
            losses = self.losses(cell, self.seen[:count])
            low, high = loss_interval(losses)
            if count == len(self.seen) or low > self.target.loss or high < self.target.loss:
                return float(losses.mean())
            count = min(2 * count, len(self.seen))

    def confirm(self) -> Choice:
        """The first candidate that the items held out confirm; else the one that they confirm least badly."""
        ordered = list((self.candidates or self.promising).values())
        ordered.sort(key=lambda pair: self.trial.cost(pair[0]) if self.target.is_quality else pair[1])
        found: list[Choice] = []
        for cell, _ in ordered:
            try:
                losses = self.losses(cell, self.held)
            except OutOfTime:
                self.out_of_time = True
                break
            loss, interval = float(losses.mean()), loss_interval(losses)
            met = loss <= self.target.loss if self.target.is_quality else True
            sure = interval[1] <= self.target.loss if self.target.is_quality else True
            cost = self.trial.cost(cell)
            found.append(self.choice(cell, cost, loss, interval, met, sure))
            if met:
                return found[-1]
        if found:
            return min(found, key=lambda choice: choice.loss)
        if ordered:
            cell, loss = ordered[0]
            seen = loss_interval(self.measured[cell.label])
            return replace(self.choice(cell, self.trial.cost(cell), loss, seen, False, False), held_out=0)
        return self.choice(None, 1.0, 0.0, (0.0, 0.0), False, False)

    def choice(
        self, cell: Cell | None, cost: float, loss: float, interval: tuple[float, float], confirmed: bool, sure: bool
    ) -> Choice:
        return Choice(
            cell,
            cost,
            loss,
            interval,
            confirmed,
            sure,
            len(self.seen),
            len(self.held),
            len(self.tried),
            self.out_of_time,
        )


def _size(cell: Cell) -> float:
    return float(cell.keep if cell.keep is not None else 1.0)
