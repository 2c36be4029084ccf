"""Accuracy and cost of a model, unpruned and under every method at every budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from transformers.utils import logging

import vlmprune
from vlmprune.budget import Keep
from vlmprune.errors import BudgetError
from vlmprune.eval.accuracy.answer_log import AnswerLog
from vlmprune.eval.accuracy.answer_scores import check_scoring
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.picture_check import check_tasks
from vlmprune.eval.accuracy.suites import find_suites
from vlmprune.eval.accuracy.task_index import data_identity, documents_of, find_tasks
from vlmprune.eval.accuracy.task_scores import TaskScore, evaluate_tasks, quiet_lmms_eval
from vlmprune.eval.accuracy.videos import is_video
from vlmprune.eval.bench_times import timed_cells, turns_of_tasks
from vlmprune.eval.models.loading import LoadedModel, fingerprint, load_model
from vlmprune.eval.models.lower_resolution import LOWER_RESOLUTION, serves_smaller_pictures
from vlmprune.eval.own_data import Fidelity, FidelityOptions, run_fidelity
from vlmprune.eval.reports.bench_results import print_tables, write_results
from vlmprune.eval.reports.summary import Row, cell_result, make_rows, summarise_requests
from vlmprune.eval.run.cells import BASELINES, Cell, LeftOut, Modality, make_cells, not_reachable, usable_cells
from vlmprune.eval.run.progress import progress_bar
from vlmprune.eval.run.ranks import Ranks
from vlmprune.eval.run.result_folder import ResultFolder
from vlmprune.eval.run.text_towers import equipped, text_tower_of
from vlmprune.eval.tune.from_table import closing_choice


@dataclass(frozen=True)
class BenchOptions:
    """What to run.

    `suites` are names of suites (see `SUITES`) whose tasks are among `tasks`; the tables show a mean for each of their abilities.
    `limit` is a number of items per task; `timing_seconds` 0 measures no time; `random_seeds` is how often `random` is run.
    `text_tower` is the folder or hub name of the CLIP model that the vision tower came from, for methods that need it.
    """

    model: str
    methods: Sequence[tuple[str, dict[str, Any]]]
    keeps: Sequence[Keep]
    tasks: Sequence[str]
    out: Path
    limit: int | None = None
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    baselines: bool = True
    task_folders: Sequence[str] = ()
    text_tower: str | None = None
    timing_seconds: float = 30.0
    timing_batch_sizes: Sequence[int] = (1,)
    random_seeds: int = 3
    suites: Sequence[str] = ()
    command: Sequence[str] = field(default_factory=lambda: tuple(sys.argv))


def run_bench(options: BenchOptions, console: Console | None = None, chosen: Sequence[Cell] | None = None) -> list[Row]:
    """Run what is not yet in `options.out`, write its results there, print the tables.

    `chosen` are the cells in the place of all methods at all budgets. A cell is stored as soon as it is finished, so an
    interrupted run loses at most one. Of several processes only the first writes, prints and returns rows. Cells that the model
    cannot give have no row, but a note beside the tables and under "left_out" in results.json.

    Raises:
        ResultFolderError: the folder holds another configuration.
    """
    started = time.perf_counter()
    ranks = Ranks()
    loaded = open_model(options)
    with quiet_lmms_eval():
        tasks = ranks.main_first(
            lambda: find_tasks(options.tasks, loaded.model.config.model_type, options.task_folders)
        )
    cells, left_out = cells_for(options, loaded, *shown_modalities(tasks), chosen=chosen)
    described = configuration(options, loaded, tasks)
    ranks.require_same("the configuration", described)
    ranks.require_same("the cells", [cell.label for cell in cells])
    folder = ranks.on_main(lambda: ResultFolder(options.out, described, required=STORED))
    console = console or Console(stderr=True, quiet=not ranks.is_main)
    bench = _Bench(options, loaded, cells, tasks, folder, console, ranks, left_out)
    with ExitStack() as stack:
        if ranks.is_main:
            stack.enter_context(folder.locked())
        rows = bench.run(started)
    ranks.close()
    return rows


STORED = {"method": str, "title": str, "parameters": dict, "tasks": dict, "cost": dict}
"""What a stored cell must hold."""


def run_on_data(
    options: BenchOptions, data: Path, new_tokens: int = 32, scoring: str = "auto", console: Console | None = None
) -> list[Fidelity]:
    """Compare every cell with the unpruned model on own prompts, with answers or without (see `run_fidelity`)."""
    check_scoring(scoring)
    loaded = open_model(options)
    cells, left_out = cells_for(options, loaded)
    wanted = FidelityOptions(
        data=data,
        cells=cells,
        out=options.out,
        limit=options.limit,
        batch_size=options.batch_size,
        new_tokens=new_tokens,
        left_out=left_out,
        scoring=scoring,
        timing_seconds=options.timing_seconds,
        timing_batch_sizes=options.timing_batch_sizes,
        command=options.command,
    )
    return run_fidelity(loaded, wanted, console)


def open_model(options: BenchOptions) -> LoadedModel:
    """The model, without the progress bars of what loads it."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    return load_model(options.model, options.dtype, options.device, options.batch_size)


def cells_for(
    options: BenchOptions, loaded: LoadedModel, *modalities: Modality, chosen: Sequence[Cell] | None = None
) -> tuple[list[Cell], list[LeftOut]]:
    """The cells asked for, and those of them that the model cannot give for all that is shown (see `usable_cells`)."""
    served = vlmprune.list_methods(loaded.model)
    baselines = [name for name in BASELINES if options.baselines and name in served]
    if options.baselines and "video" not in modalities and serves_smaller_pictures(loaded.model, loaded.processor):
        baselines.append(LOWER_RESOLUTION)
    cells = chosen or make_cells(options.methods, options.keeps, options.seed, baselines, options.random_seeds)
    cells = equipped(cells, text_tower_of(loaded.source, options.text_tower), loaded.processor)
    return usable_cells(loaded.model, cells, options.methods, *modalities)


def shown_modalities(tasks: Mapping[str, Any]) -> list[Modality]:
    """What tasks show, each kind once; of a task its first item that shows something counts."""
    found: dict[Modality, None] = {}
    for task in tasks.values():
        visuals: Sequence[Any] = next(filter(None, map(task.doc_to_visual, documents_of(task))), [])
        if visuals:
            found["video" if any(map(is_video, visuals)) else "image"] = None
    return list(found)


def configuration(options: BenchOptions, loaded: LoadedModel, tasks: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides a cell's scores besides its method and budget."""
    tower = text_tower_of(loaded.source, options.text_tower)
    return {
        "model": loaded.describe(),
        **({} if tower is None else {"text_tower": {"source": tower, "fingerprint": fingerprint(tower)}}),
        "tasks": {name: data_identity(task) for name, task in tasks.items()},
        "limit": options.limit,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }


@dataclass(frozen=True)
class _Bench:
    """A benchmark that is ready to run."""

    options: BenchOptions
    loaded: LoadedModel
    cells: Sequence[Cell]
    tasks: dict[str, Any]
    folder: ResultFolder
    console: Console
    ranks: Ranks
    left_out: list[LeftOut]

    @property
    def answered(self) -> list[Cell]:
        """The cells without those that turned out to be out of reach for some picture."""
        missing = {(item.title, repr(item.keep)) for item in self.left_out}
        return [cell for cell in self.cells if (cell.title, repr(cell.keep)) not in missing]

    def run(self, started: float) -> list[Row]:
        """Answer, measure times, write and print; rows in the first process. The tables hold all cells of the folder."""
        model_seconds = self.answer()
        if not self.ranks.is_main:
            return []
        tower = text_tower_of(self.loaded.source, self.options.text_tower)
        earlier = equipped(self.folder.others(self.answered), tower, self.loaded.processor)
        cells = in_order([*self.answered, *earlier])
        answered = time.perf_counter()
        timing = self.time(cells)
        seconds = {
            "all": answered - started,
            "answering_inside_the_model": model_seconds,
            "measuring_times": time.perf_counter() - answered,
        }
        rows = make_rows([self.folder.read(cell) for cell in cells], timing)
        suites, choice = find_suites(self.options.suites), closing_choice(rows)
        closing = None if choice is None else (choice.line, choice.sentence)
        write_results(self.options.command, self.folder, rows, self.left_out, seconds, suites, closing)
        print_tables(rows, self.folder.path, self.left_out, suites, closing)
        return rows

    def answer(self) -> float:
        """Answer all items in every cell that is not stored yet; returns the seconds spent inside the model."""
        options, model = self.options, self.loaded.model
        todo = self.ranks.on_main(lambda: [cell for cell in self.cells if not self.folder.has(cell)])
        if len(todo) < len(self.cells):
            self.console.print(
                f"{len(self.cells) - len(todo)} of {len(self.cells)} cells are in {self.folder.path} already."
            )
        if len(todo) == len(self.cells) and self.ranks.is_main:
            self._check_pictures()
        items = -(-sum(_items(task, options.limit) for task in self.tasks.values()) // self.ranks.count)
        model_seconds = 0.0
        with progress_bar(self.console) as progress:
            bar = progress.add_task("", total=len(todo) * items)
            advance = partial(progress.advance, bar)
            live = LiveModel(model, self.loaded.processor, batch_size=options.batch_size, on_progress=advance)
            for number, cell in enumerate(todo, start=1):
                progress.update(bar, description=f"[{number}/{len(todo)}] {cell.label:<24.24}")
                start = time.perf_counter()
                with cell.applied_to(model):
                    log = AnswerLog(self.folder.unfinished(cell, self.ranks.rank))
                    live.reset(cell.is_pruned, cell.resolution(model, self.loaded.processor), log)
                    try:
                        scores = evaluate_tasks(live, self.tasks, options.limit, options.seed)
                    except BudgetError as error:
                        # Whether a number of tokens can be reached depends on the picture. Of several processes the others
                        # may be past it, and wait.
                        if self.ranks.count > 1:
                            raise
                        self.left_out.append(not_reachable(cell, error))
                        log.close()
                        progress.update(bar, completed=number * items)
                        continue
                records = self.ranks.gathered(live.records)
                model_seconds += live.model_seconds
                progress.update(bar, completed=number * items)
                if scores is not None:
                    seconds = {"all": time.perf_counter() - start, "inside_the_model": live.model_seconds}
                    cost = summarise_requests(model.config, records, model.dtype.itemsize, cell.make_method())
                    self.folder.write(cell, cell_result(cell, scores, cost, seconds))
                log.close()
                if scores is not None:
                    self._report(f"[{number}/{len(todo)}] {cell.label}", scores, seconds["all"])
        return model_seconds

    def _check_pictures(self) -> None:
        with progress_bar(self.console) as progress:
            count = sum(_items(task, self.options.limit) for task in self.tasks.values())
            bar = progress.add_task(f"{'checking pictures':<32}", total=count)
            check_tasks(self.tasks, self.options.limit, partial(progress.advance, bar))

    def _report(self, what: str, scores: Mapping[str, TaskScore], seconds: float) -> None:
        if not self.console.is_terminal:
            average = sum(score.score for score in scores.values()) / len(scores)
            self.console.print(f"{what}: accuracy {100 * average:.1f} %, {seconds:.1f} s", markup=False)

    def time(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Times of these cells (see `timed_cells`); none where no time is given to it."""
        options = self.options
        if not options.timing_seconds:
            return {}
        return timed_cells(
            LiveModel(self.loaded.model, self.loaded.processor),
            partial(turns_of_tasks, self.tasks, options.limit),
            cells,
            options.timing_batch_sizes,
            options.timing_seconds,
            self.folder.path / "timing.json",
            self.console,
        )


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one title beside each other, titles and cells in the order in which they first occur."""
    titles = list(dict.fromkeys(cell.title for cell in cells))
    return sorted(cells, key=lambda cell: titles.index(cell.title))


def _items(task: Any, limit: int | None) -> int:
    documents = len(documents_of(task))
    return documents if limit is None else min(limit, documents)
