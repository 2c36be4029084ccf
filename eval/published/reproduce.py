"""`vlmprune reproduce`: rows that papers published, run through lmms-eval and printed beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmprune.eval.accuracy.paired_intervals import mean_interval, share_interval
from vlmprune.eval.bench import BenchOptions, run_bench
from vlmprune.eval.reports.tables import as_markdown
from vlmprune.eval.run.cells import FULL, Cell
from vlmprune.eval.run.figures import keep_text
from vlmprune.eval.run.result_folder import read_json, write_json
from vlmprune.eval.run.table_style import cost_style

from .tables import Benchmark, Published

NOT_RUN = "not run"


@dataclass(frozen=True)
class Reproduced:
    """One published figure beside the measured one; `measured` is None where it was not run, `interval` of `items` is 95 %."""

    method: str
    keep: str
    benchmark: str
    published: float | None
    measured: float | None
    interval: tuple[float, float] | None
    items: int
    source: str


def run_reproduce(published: Published, options: BenchOptions, console: Console | None = None) -> list[Reproduced]:
    """Run the unpruned model and every published row on its benchmarks, print and write reproduce.json and reproduce.md.

    `options` says model, folder and limits; its methods, budgets and tasks are those of `published`.
    """
    cells = list(dict.fromkeys([Cell(), *(row.cell for row in published.rows)]))
    run_bench(options, console, cells)
    found = compare(published, [read_json(file) for file in sorted((options.out / "cells").glob("*.json"))])
    output = Console(width=100)
    table = reproduced_table(found, options.limit)
    output.print(table)
    notes = [f"{name}: {benchmark.prompt}." for name, benchmark in published.benchmarks.items()]
    sources = list(dict.fromkeys(row.source for row in published.rows))
    text = "\n".join([*notes, "Published by: " + "; ".join(sources) + "."])
    output.print(text, soft_wrap=True, markup=False, highlight=False)
    content = {"model": options.model, "limit": options.limit, "notes": notes, "rows": [asdict(row) for row in found]}
    write_json(options.out / "reproduce.json", content)
    (options.out / "reproduce.md").write_text(f"{as_markdown(table)}\n{text}\n", encoding="utf-8")
    return found


def compare(published: Published, stored: Sequence[Mapping[str, Any]]) -> list[Reproduced]:
    """Every published figure beside that of the stored cell of its label; first the unpruned model's of each paper."""
    by_label = {result["label"]: result for result in stored}
    found, seen = [], set()
    for row in published.rows:
        for cell, scores in ((Cell(), {name: row.full.get(name) for name in row.scores}), (row.cell, row.scores)):
            for name, value in scores.items():
                key = (cell.label, name, row.source)
                if key not in seen:
                    seen.add(key)
                    result = by_label.get(cell.label, {"tasks": {}})
                    measured = _measured(published.benchmarks[name], result["tasks"])
                    found.append(Reproduced(cell.title, keep_text(cell.keep), name, value, *measured, row.source))
    return sorted(found, key=lambda row: (row.source, row.method != FULL))


def _measured(benchmark: Benchmark, tasks: Mapping[str, Any]) -> tuple[float | None, tuple[float, float] | None, int]:
    task = tasks.get(benchmark.task)
    if task is None or not all(metric in task["metrics"] for metric in benchmark.metrics):
        return None, None, 0
    value = benchmark.scale * sum(task["metrics"][metric] for metric in benchmark.metrics)
    scores = [sample["score"] for sample in task["samples"]]
    if (
        not scores
        or None in scores
        or not math.isclose(benchmark.scale * math.fsum(scores) / len(scores), value, rel_tol=1e-6)
    ):
        # The figure is no mean over items, as an F1 score or points are none.
        return value, None, len(scores)
    whole = all(score in (0.0, 1.0) for score in scores)
    low, high = share_interval(int(sum(scores)), len(scores)) if whole else mean_interval(scores)
    return value, (benchmark.scale * low, benchmark.scale * high), len(scores)


def reproduced_table(rows: Sequence[Reproduced], limit: int | None) -> Table:
    """Published beside measured; a figure that was not run has words in its place."""
    table = cost_style(
        "Published and measured" + ("" if limit is None else f" on the first {limit} items of each task")
    )
    table.add_column("method", no_wrap=True, max_width=22)
    table.add_column("keep", justify="right", no_wrap=True)
    table.add_column("benchmark", no_wrap=True)
    for name in ("published", "measured", "95 %", "items", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        published = "not given" if row.published is None else f"{row.published:g}"
        measured = NOT_RUN if row.measured is None else f"{row.measured:.1f}"
        between = "no mean of items" if row.measured is not None else NOT_RUN
        if row.interval is not None:
            between = f"{row.interval[0]:.1f} to {row.interval[1]:.1f}"
        known = row.measured is not None and row.published is not None
        difference = f"{row.measured - row.published:+.1f}" if known else "none"  # type: ignore[operator]
        last = following is None or (following.method, following.keep) != (row.method, row.keep)
        texts = (published, measured, between, str(row.items), difference)
        table.add_row(row.method, row.keep, row.benchmark, *texts, end_section=last)
    return table
