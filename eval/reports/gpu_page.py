"""The page of `vlmprune gpu-report`."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Any

from vlmprune.eval.run.cells import FULL
from vlmprune.eval.run.result_folder import read_json

from .html_page import STYLE, Column, facts_of, latency_columns, machine_facts, table_of, written

KERNEL = (
    "op",
    "contender",
    "batch",
    "tokens",
    "kept",
    "dim",
    "dtype",
    "median_ms",
    "copy_share",
    "ours_is_faster_by",
    "checked",
)


def write_gpu_page(content: Mapping[str, Any], steps: Sequence[Path], file: Path) -> Path:
    """Write one page of all steps' tables, machine, driver and versions, and what failed.

    Raises:
        ReportError: it cannot be written.
    """
    kernels = [line for step in steps for line in _kernel_lines(step / "kernels.csv")]
    rows = _latency_rows(steps)
    title = f"vlmprune gpu-report: {content['configuration']['preset']} on {content['device']['device']}"
    failed = [step for step in content["steps"] if step["problem"]]
    device = content["device"]
    facts = {
        **machine_facts(content["machine"]),
        "driver": device["driver"] or "none (no GPU)",
        "triton": device["triton"],
    }
    columns: list[Column] = [(name.replace("_", " "), itemgetter(name)) for name in KERNEL]
    parts = [
        f"<h1>{escape(title)}</h1>",
        facts_of(facts),
        f"<p>{len(content['steps']) - len(failed)} of {len(content['steps'])} steps worked.</p>",
        *(f"<h3>Failed: {escape(step['step'])}</h3><pre>{escape(step['problem'])}</pre>" for step in failed),
        "<h2>Kernels</h2><p>Checked against a float64 computation on this device; median times, and what share of the copy "
        "bandwidth the bytes make that must be moved at least.</p>",
        table_of(columns, kernels) if kernels else "<p>None was measured.</p>",
        "<h2>Latency with random weights</h2>",
        table_of(latency_columns(), rows) if rows else "<p>Nothing was measured.</p>",
        *(f"<p>{escape(note)}</p>" for note in content["left_out"]),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(parts)}</body></html>\n"
    )
    return written(page, file)


def _kernel_lines(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _latency_rows(steps: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of all steps, the unpruned model's of each step before its methods; each step measured it anew."""
    found: list[dict[str, Any]] = []
    for step in steps:
        file = step / "latency" / "latency.json"
        if file.is_file():
            name = step.name.removeprefix("latency-")
            rows = read_json(file)["rows"]
            found += [{**row, "title": f"{FULL} (step {name})"} if row["title"] == FULL else row for row in rows]
    return found
