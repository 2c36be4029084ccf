"""Published results as data: what papers report for a model, with source, budgets, prompts and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError, unknown
from vlmprune.eval.run.cells import Cell

FOLDER = Path(__file__).parent


class PublishedTableError(VlmpruneError, ValueError):
    """A file is no table of published results."""


@dataclass(frozen=True)
class Benchmark:
    """What stands for a column of a paper in lmms-eval.

    `metrics` are added, times `scale`; `prompt` says what is asked, and where that differs from the papers'.
    """

    task: str
    metrics: tuple[str, ...]
    scale: float
    prompt: str


@dataclass(frozen=True)
class PublishedRow:
    """One row of a paper: the cell, its scores by benchmark, the unpruned model's where the paper has them, and the source."""

    cell: Cell
    scores: Mapping[str, float]
    full: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Published:
    """Everything that is known of one model."""

    model: str
    benchmarks: Mapping[str, Benchmark]
    rows: Sequence[PublishedRow]

    def chosen(self, methods: Iterable[str], benchmarks: Iterable[str]) -> Published:
        """The rows of these methods and their scores on these benchmarks; all where none is named.

        Raises:
            UnknownNameError: nothing is published of a name.
        """
        known = list(dict.fromkeys(row.cell.method for row in self.rows))
        wanted, columns = list(methods) or known, list(benchmarks) or list(self.benchmarks)
        for what, names, allowed in (
            ("published method", wanted, known),
            ("benchmark", columns, list(self.benchmarks)),
        ):
            for name in names:
                if name not in allowed:
                    raise unknown(what, name, allowed)
        rows = [
            PublishedRow(
                row.cell, {name: row.scores[name] for name in columns if name in row.scores}, row.full, row.source
            )
            for row in self.rows
            if row.cell.method in wanted
        ]
        rows = [row for row in rows if row.scores]
        used = {name for row in rows for name in row.scores}
        return Published(self.model, {name: self.benchmarks[name] for name in columns if name in used}, rows)


def published_names() -> list[str]:
    """Models of which tables are shipped."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read_published(name: str, file: Path | None = None) -> Published:
    """The shipped tables of a model, or those of a file of the same form.

    Raises:
        UnknownNameError: none are shipped of that name.
        PublishedTableError: the file is no such table.
    """
    if file is None and name not in published_names():
        raise unknown("model with published results", name, published_names())
    source = file or FOLDER / f"{name}.json"
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        benchmarks = {
            key: Benchmark(value["task"], tuple(value["metrics"]), float(value["scale"]), str(value["prompt"]))
            for key, value in content["benchmarks"].items()
        }
        rows = [_row(row, table) for table in content["tables"] for row in table["rows"]]
        lost = sorted({key for row in rows for key in (*row.scores, *row.full)} - set(benchmarks))
        if lost:
            raise KeyError(f"benchmarks {lost}")
        return Published(str(content["model"]), benchmarks, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishedTableError(f"{str(source)!r} is no table of published results: {error!r}.") from error


def _row(row: Mapping[str, Any], table: Mapping[str, Any]) -> PublishedRow:
    cell = Cell(row["method"], row["keep"], tuple(sorted(row.get("parameters", {}).items())))
    cell.make_method()
    return PublishedRow(cell, dict(row["scores"]), dict(table["full"]), str(table["source"]))
