"""CSV files of results, one line a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .machine import describe_machine

Line = Mapping[str, Any]


def csv_text(lines: Sequence[Line], header: bool = True) -> str:
    """Lines of CSV text, columns in the order in which they first occur."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    """Write a file of these lines."""
    path.write_text(csv_text(lines), encoding="utf-8", newline="")


def add_to_csv(path: Path, lines: Sequence[Line]) -> None:
    """Add lines to a file, which is begun with a header where it does not exist."""
    text = csv_text(lines, header=not path.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def flattened(values: Line, digits: int, unit: str = "", unitless: Sequence[str] = ()) -> dict[str, Any]:
    """A line in which a spread is one column a part, `{name}{unit}_{part}`.

    Args:
        values: numbers, texts and spreads by name.
        digits: significant digits of the parts.
        unit: what names of spreads get.
        unitless: spreads that do not get it.
    """
    line: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            name = key if key in unitless else f"{key}{unit}"
            line.update({f"{name}_{part}": f"{number:.{digits}g}" for part, number in value.items()})
        else:
            line[key] = value
    return line


def this_run() -> dict[str, Any]:
    """Columns that say on what and when a line was measured."""
    machine = describe_machine()
    return {"cpu": machine["cpu"], "threads": machine["torch_threads"], "date": machine["date"]}
