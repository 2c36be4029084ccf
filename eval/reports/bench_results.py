"""What a finished benchmark prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmprune.eval.accuracy.against_baselines import Comparison, compare_all, compare_with_baselines
from vlmprune.eval.accuracy.suites import Suite, ability_means
from vlmprune.eval.run.cells import COMPARED, LeftOut
from vlmprune.eval.run.machine import describe_machine
from vlmprune.eval.run.result_folder import ResultFolder, write_json

from .html_page import write_report
from .plots import plot_pareto
from .stored_results import COSTS, model_name, points_of
from .summary import Row, results_csv
from .tables import (
    ability_table,
    accuracy_tables,
    as_markdown,
    baseline_table,
    best_table,
    cost_table,
    paired_table,
    time_tables,
)

Closing = tuple[str, str]
"""The line to paste (empty where nothing meets the tolerance) and the sentence of a choice."""


def print_tables(
    rows: Sequence[Row],
    folder: Path,
    left_out: Sequence[LeftOut] = (),
    suites: Sequence[Suite] = (),
    closing: Closing | None = None,
) -> None:
    """Accuracy and cost, at most 100 columns wide, what is left out of them, and the choice that they allow."""
    output = Console(width=100)
    for table in _tables(rows, suites):
        output.print(table)
        output.print()
    for item in left_out:
        output.print(item.note, soft_wrap=True, markup=False, highlight=False)
    for text in closing or ():
        if text:
            output.print(text, soft_wrap=True, markup=False, highlight=False)
    output.print(
        f"Results, plots, and a page of both (report.html); every answer is under cells: {folder}", soft_wrap=True
    )


def write_results(
    command: Sequence[str],
    folder: ResultFolder,
    rows: Sequence[Row],
    left_out: Sequence[LeftOut],
    seconds: dict[str, float],
    suites: Sequence[Suite] = (),
    closing: Closing | None = None,
) -> None:
    """Write results.json, results.csv, tables.md, the plots and report.html."""
    content: dict[str, Any] = {
        "command": list(command),
        "machine": describe_machine(),
        "configuration": folder.configuration,
        "seconds": seconds,
        "conventions": {
            "flops": "2 per multiply-accumulate; matrix and attention products, also of selecting; attention in full, not causal",
            "visual_tokens_after": "mean over language-model layers and requests",
            "relative": "mean over tasks of score / score of the unpruned model",
            "ratio": "mean score / mean score of the unpruned model (of full)",
            "paired": "against the unpruned model on the same items; 95 % intervals with one changed item added in "
            "each direction (Bonett and Price; Fieller for the ratio)",
            "against_baselines": "exact sign test on the same items, adjusted for all comparisons (false discovery rate 5 %)",
            "methods_compared": "every two cells of one budget, the same tests adjusted for all of them",
            "times": "milliseconds, medians with quartiles over rounds and requests, all cells in turn within one run",
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
                "abilities": ability_means(suites, row.scores),
                "relative": row.relative,
                "paired": row.paired,
                "timing": row.times or None,
            }
            for row in rows
        ],
        "against_baselines": [
            {**asdict(comparison), "verdict": comparison.verdict} for comparison in _comparisons(rows)
        ],
        "methods_compared": [
            {**asdict(comparison), "verdict": comparison.verdict} for comparison in _all_comparisons(rows)
        ],
        "left_out": [item.described() for item in left_out],
        "choice": None if closing is None else {"line": closing[0], "sentence": closing[1]},
    }
    write_json(folder.path / "results.json", content)
    (folder.path / "results.csv").write_text(results_csv(rows), encoding="utf-8")
    name = model_name(content)
    for cost, label in COSTS.items():
        points = points_of(content["cells"], cost)
        title = f"{name}: accuracy against {label.split(' (')[0]}"
        if points:
            plot_pareto(points, folder.path / f"accuracy_vs_{cost}.png", label, title)
    markdown = "\n".join(map(as_markdown, _tables(rows, suites)))
    notes = "".join(f"\n- {item.note}" for item in left_out)
    line, sentence = closing or ("", "")
    choice = "\n" + (f"`{line}`\n\n" if line else "") + f"{sentence}\n" if sentence else ""
    left = f"\nLeft out:\n{notes}\n" if notes else ""
    (folder.path / "tables.md").write_text(markdown + choice + left, encoding="utf-8")
    write_report([folder.path], folder.path / "report.html")


def _comparisons(rows: Sequence[Row]) -> list[Comparison]:
    return compare_with_baselines([row.result for row in rows], COMPARED)


def _all_comparisons(rows: Sequence[Row]) -> list[Comparison]:
    return compare_all([row.result for row in rows])


def _tables(rows: Sequence[Row], suites: Sequence[Suite]) -> list[Table]:
    comparisons = _comparisons(rows)
    against = [baseline_table(comparisons)] if comparisons else []
    abilities = ability_table(rows, suites)
    found = [
        *accuracy_tables(rows),
        abilities,
        paired_table(rows),
        *against,
        best_table(_all_comparisons(rows)),
        cost_table(rows),
    ]
    return [table for table in (*found, *time_tables(rows)) if table is not None]
