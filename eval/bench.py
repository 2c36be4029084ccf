"""Accuracy and cost of a model, unpruned and under every method at every budget."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

from vlmprune.budget import Keep

from .accuracy import evaluate_tasks, quiet_lmms_eval
from .cells import Cell, check_cells, make_cells
from .lmms_model import LiveModel
from .loading import LoadedModel, load_model
from .machine import describe_machine
from .plots import plot_pareto
from .result_folder import ResultFolder, read_json, write_json
from .summary import Row, cell_result, make_rows, results_csv, summarise_requests
from .tables import accuracy_table, cost_table
from .task_index import data_identity, find_tasks
from .timing import time_cells


@dataclass(frozen=True)
class BenchOptions:
    """What to run. ``limit`` is a number of items per task; ``timing_seconds`` 0 measures no time."""

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
    timing_seconds: float = 20.0
    command: Sequence[str] = field(default_factory=lambda: tuple(sys.argv))


def run_bench(options: BenchOptions, console: Console | None = None) -> list[Row]:
    """Run what is not yet in ``options.out``, write results.json, results.csv and a plot there, print the tables.

    Raises ``ResultFolderError`` where the folder holds another configuration; a cell is stored as soon as it is
    finished, so an interrupted run loses at most one.
    """
    console = console or Console(stderr=True)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    started = time.perf_counter()
    loaded = load_model(options.model, options.dtype, options.device)
    cells = make_cells(options.methods, options.keeps, options.seed, options.baselines)
    check_cells(loaded.model, cells)
    with quiet_lmms_eval():
        tasks = find_tasks(options.tasks, loaded.model.config.model_type, options.task_folders)
    folder = ResultFolder(options.out, configuration(options, loaded, tasks))
    model_seconds = _run_cells(options, loaded, cells, tasks, folder, console)
    timing = _run_timing(options, loaded, cells, tasks, folder, console)
    results = [{**folder.read(cell), "timing": timing.get(cell.label)} for cell in cells]
    rows = make_rows(results, timing)
    seconds = {"all": time.perf_counter() - started, "inside_the_model": model_seconds}
    write_results(options, folder, rows, seconds)
    output = Console(width=None if sys.stdout.isatty() else 100)
    output.print(accuracy_table(rows))
    output.print(cost_table(rows))
    output.print(f"Results, plot and every answer: {folder.path}")
    return rows


def configuration(options: BenchOptions, loaded: LoadedModel, tasks: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides a cell's scores besides its method and budget."""
    return {
        "model": loaded.describe(),
        "tasks": {name: data_identity(task) for name, task in tasks.items()},
        "limit": options.limit,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _run_cells(
    options: BenchOptions,
    loaded: LoadedModel,
    cells: Sequence[Cell],
    tasks: dict[str, Any],
    folder: ResultFolder,
    console: Console,
) -> float:
    items = sum(_items(task, options.limit) for task in tasks.values())
    todo = [cell for cell in cells if not folder.has(cell)]
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} cells are in {folder.path} already.")
    model_seconds = 0.0
    element_size = loaded.model.dtype.itemsize
    with _progress(console) as progress:
        bar = progress.add_task("", total=len(todo) * items)
        live = LiveModel(
            loaded.model,
            loaded.processor,
            batch_size=options.batch_size,
            on_progress=lambda n: progress.advance(bar, n),
        )
        for number, cell in enumerate(todo, start=1):
            progress.update(bar, description=f"[{number}/{len(todo)}] {cell.label:<24.24}")
            start = time.perf_counter()
            with cell.applied_to(loaded.model):
                live.reset(pruned=not cell.is_full)
                scores = evaluate_tasks(live, tasks, options.limit, options.seed)
            if scores is None:
                continue
            cost = summarise_requests(loaded.model.config, live.records, element_size)
            seconds = {"all": time.perf_counter() - start, "inside_the_model": live.model_seconds}
            folder.write(cell, cell_result(cell, scores, cost, seconds))
            model_seconds += live.model_seconds
            progress.update(bar, completed=number * items)
            if not console.is_terminal:
                average = sum(score.score for score in scores.values()) / len(scores)
                console.print(
                    f"[{number}/{len(todo)}] {cell.label}: accuracy {100 * average:.1f} %, {seconds['all']:.1f} s",
                    markup=False,
                )
    return model_seconds


def _items(task: Any, limit: int | None) -> int:
    documents = len(task.test_docs() if task.has_test_docs() else task.validation_docs())
    return documents if limit is None else min(limit, documents)


def _run_timing(
    options: BenchOptions,
    loaded: LoadedModel,
    cells: Sequence[Cell],
    tasks: dict[str, Any],
    folder: ResultFolder,
    console: Console,
) -> dict[str, Any]:
    if not options.timing_seconds:
        return {}
    file = folder.path / "timing.json"
    stored: dict[str, Any] = read_json(file) if file.exists() else {}
    if all(cell.label in stored for cell in cells):
        return stored
    task = next(iter(tasks.values()))
    document = (task.test_docs() if task.has_test_docs() else task.validation_docs())[0]
    live = LiveModel(loaded.model, loaded.processor)
    inputs = live.encode_turn(str(task.doc_to_text(document)), task.doc_to_visual(document))
    with _progress(console) as progress:
        bar = progress.add_task(f"{'timing, rounds over all cells':<32}", total=None)
        timing = time_cells(
            loaded.model,
            inputs,
            cells,
            options.timing_seconds,
            lambda done, rounds: progress.update(bar, completed=done, total=rounds),
        )
    write_json(file, timing)
    return timing


def write_results(options: BenchOptions, folder: ResultFolder, rows: Sequence[Row], seconds: dict[str, float]) -> None:
    """Write results.json, results.csv and accuracy_vs_flops.png."""
    content = {
        "command": list(options.command),
        "machine": describe_machine(),
        "configuration": folder.configuration,
        "seconds": seconds,
        "conventions": {
            "flops": "2 per multiply-accumulate; matrix and attention products; attention in full, not causal",
            "visual_tokens_after": "mean over language-model layers and requests",
            "relative": "mean over tasks of score / score of the unpruned model",
            "times": "milliseconds at batch size 1, medians with quartiles, all cells in turn within one run",
            "formulas": "as published, on visual tokens only; they are multiply-accumulates",
        },
        "cells": [
            {
                **{key: value for key, value in row.result.items() if key != "tasks"},
                "tasks": {
                    name: {key: value for key, value in task.items() if key != "samples"}
                    for name, task in row.result["tasks"].items()
                },
                "average": row.average,
                "relative": row.relative,
            }
            for row in rows
        ],
    }
    write_json(folder.path / "results.json", content)
    (folder.path / "results.csv").write_text(results_csv(rows), encoding="utf-8")
    name = folder.configuration["model"]["source"].rstrip("/").split("/")[-1]
    plot_pareto(
        rows,
        folder.path / "accuracy_vs_flops.png",
        lambda row: row.flops["prefill_total"] / 1e9,
        "GFLOPs until the first token (vision tower, projector, language model)",
        f"{name}: accuracy against compute",
    )
