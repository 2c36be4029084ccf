"""What the search asks for, measured on a live model, every item stored as soon as it is answered."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vlmprune.errors import BudgetError
from vlmprune.eval.accuracy.answer_scores import score_answer
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.own_answers import Asked, Reply, agreement, replies
from vlmprune.eval.accuracy.prompts import Prompt
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.eval.reports.summary import summarise_requests
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.speed.cell_times import time_generation

from .search import OutOfTime
from .targets import Target
from .task_items import TaskItem

LOST = 1e9
"""The loss of a cell that some picture does not allow."""
TIMED_REQUESTS = 3
SEARCHING = 0.8
"""Share of the time given that the search may use; the rest is for the confirmation."""


class LiveTrial:
    """Losses and costs of cells on prompts.

    Args:
        loaded: the model, without a method.
        prompts: the items.
        target: decides what a loss is.
        new_tokens: tokens generated for each.
        file: where losses are kept, one line a measurement; those that it holds are not measured again.
        seconds: time from now on after which nothing more is measured; None for no end.
        scoring: how answers are scored (see `score_answer`).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Prompt | TaskItem],
        target: Target,
        new_tokens: int,
        file: Path | None,
        seconds: float | None,
        scoring: str = "auto",
    ) -> None:
        self.loaded, self.prompts, self.target = loaded, prompts, target
        self.new_tokens, self.file, self.scoring = new_tokens, file, scoring
        self.live = LiveModel(loaded.model, loaded.processor)
        self.end = None if seconds is None else time.monotonic() + SEARCHING * seconds
        self.kept_back = 0.0 if seconds is None else (1 - SEARCHING) * seconds
        self._full: dict[int, Reply] = {}
        self._full_cost: dict[str, Any] | None = None
        self._losses: dict[tuple[str, int], float] = {}
        self._costs: dict[str, dict[str, float]] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            label, items, costs = json.loads(line)
        except ValueError:
            # The line that was being written when the run was killed.
            return
        self._losses.update({(label, int(item)): loss for item, loss in items.items()})
        self._costs.setdefault(label, {}).update(costs)

    def _keep(self, cell: Cell, items: dict[int, float], costs: dict[str, float]) -> None:
        line = json.dumps([cell.label, items, costs])
        self._take(line)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}")

    def losses(self, cell: Cell, items: Sequence[int]) -> np.ndarray:
        """What each item loses against the unpruned model: 1 for another answer, its divergence, or points of its score."""
        missing = [item for item in items if (cell.label, item) not in self._losses]
        for item in missing:
            self._check_time()
            self._unpruned(item)
        self._measure(cell, missing)
        return np.array([self._losses[cell.label, item] for item in items])

    def search_is_over(self) -> None:
        """The confirmation begins: it has the rest of the time, and what the search left."""
        if self.end is not None:
            self.end += self.kept_back

    def _check_time(self) -> None:
        if self.end is not None and time.monotonic() > self.end:
            raise OutOfTime

    def _unpruned(self, item: int) -> Reply:
        if item not in self._full:
            self.live.reset(pruned=False)
            (self._full[item],) = self._replies(item)
            if self._full_cost is None:
                self._full_cost = self._summary(Cell())
        return self._full[item]

    def _measure(self, cell: Cell, items: Sequence[int]) -> None:
        """Measure items of a cell, the method put on once."""
        if not items:
            return
        model = self.loaded.model
        with cell.applied_to(model):
            for item in items:
                self._check_time()
                self.live.reset(cell.is_pruned, cell.resolution(model, self.loaded.processor))
                try:
                    found = self._replies(item)
                except BudgetError:
                    self._keep(cell, {item: LOST}, {})
                else:
                    self._compare(cell, item, found)

    def _replies(self, item: int) -> list[Reply]:
        prompt = self.prompts[item]
        length = min(self.new_tokens, prompt.new_tokens) if isinstance(prompt, TaskItem) else self.new_tokens
        return replies(self.live, [(item, [prompt])], length, lambda count: None)

    def _score(self, item: int, answer: str) -> float:
        prompt = self.prompts[item]
        if isinstance(prompt, TaskItem):
            return prompt.score(answer)
        return score_answer(answer, prompt.answers, prompt.choices, self.scoring)

    def _compare(self, cell: Cell, item: int, found: Sequence[Reply]) -> None:
        full = self._full[item]
        (compared,) = agreement([full], found, self.live.records)
        if self.target.kind == "kl":
            loss = compared.kl
        elif self.target.kind == "accuracy_drop":
            loss = self._score(item, full.text) - self._score(item, compared.answer)
        else:
            loss = float(not compared.same_answer)
        costs = {} if "flops" in self._costs.get(cell.label, {}) else self._shares(cell)
        self._keep(cell, {item: loss}, costs)

    def _summary(self, cell: Cell) -> dict[str, Any]:
        model = self.loaded.model
        return summarise_requests(model.config, self.live.records, model.dtype.itemsize, cell.make_method())

    def _shares(self, cell: Cell) -> dict[str, float]:
        """FLOPs to the first token and bytes of the cache as shares of the unpruned model's on the same item."""
        mine = self._summary(cell)
        self._reset_full_cost()
        full = self._full_cost or mine
        return {
            "flops": mine["flops"]["prefill_total"] / full["flops"]["prefill_total"],
            "kv": mine["kv_cache_bytes"] / full["kv_cache_bytes"],
        }

    def _reset_full_cost(self) -> None:
        """The unpruned cost of the very item that the live model answered last."""
        record = self.live.records[-1]
        layers = len(record.visual_per_layer)
        whole = type(record)(
            record.task, record.doc_id, record.visual_before, (record.visual_before,) * layers, record.text_tokens,
            record.new_tokens, record.work,
        )  # fmt: skip
        model = self.loaded.model
        self._full_cost = summarise_requests(model.config, [whole], model.dtype.itemsize)

    def cost(self, cell: Cell) -> float:
        """FLOPs to the first token as a share of the unpruned model's."""
        return self._cost(cell, "flops")

    def _cost(self, cell: Cell, name: str) -> float:
        if name not in self._costs.get(cell.label, {}):
            item = 0
            self._check_time()
            self._unpruned(item)
            self._losses.pop((cell.label, item), None)
            self._measure(cell, [item])
        return self._costs.get(cell.label, {}).get(name, 1.0)

    def meets(self, cell: Cell, target: Target) -> bool:
        """Whether the share of the cache, or the measured speed-up of the first token, is within the bound."""
        if target.kind == "kv_share":
            return self._cost(cell, "kv") <= target.value
        return self.speed_up(cell) >= target.value

    def speed_up(self, cell: Cell) -> float:
        """Median time to the first token of the unpruned model over this cell's, on a few of the prompts in turn."""
        stored = self._costs.get(cell.label, {}).get("speed_up")
        if stored is not None:
            return stored
        ratios = []
        for number in range(TIMED_REQUESTS):
            self._check_time()
            prompt = self.prompts[number * len(self.prompts) // TIMED_REQUESTS]
            try:
                ratios.append(self._prefill(Cell(), prompt) / self._prefill(cell, prompt))
            except BudgetError:
                ratios.append(0.0)
        self._keep(cell, {}, {"speed_up": float(np.median(ratios))})
        return self._costs[cell.label]["speed_up"]

    def _prefill(self, cell: Cell, prompt: Asked) -> float:
        model = self.loaded.model
        with cell.applied_to(model):
            self.live.resolution = cell.resolution(model, self.loaded.processor)
            inputs = self.live.encode_turns([(prompt.text, prompt.images)])
            time_generation(model, inputs, 1)
            return fmean(time_generation(model, inputs, 1)[0] for _ in range(2))
