"""A report in the format that the ending of its file asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmprune.errors import unknown

from .html_page import write_report, written
from .latex import latex_tables
from .models_compared import write_comparison
from .stored_results import write_plot

PLOTS = (".svg", ".pdf", ".png")


def write(folders: Sequence[str | Path], file: Path) -> list[Path]:
    """Write the report; the files that were written.

    Raises:
        UnknownNameError: the ending stands for no format.
        ReportError: a folder holds no results, or the file cannot be written.
    """
    if file.suffix in PLOTS:
        return write_plot(folders, file)
    if file.suffix == ".md":
        return [write_comparison(folders, file)]
    if file.suffix == ".tex":
        return [written(latex_tables(folders), file)]
    if file.suffix in (".html", ".htm"):
        return [write_report(folders, file)]
    raise unknown("ending of a report", file.suffix, [".html", ".md", ".tex", *PLOTS])
