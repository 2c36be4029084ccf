"""Tables of finished benchmarks for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune.eval.run.figures import keep_text, percent

from .stored_results import model_name, read_bench, run_folders
from .tables import short_names

_SPECIAL = str.maketrans(
    {**{mark: f"\\{mark}" for mark in "&%$#_{}"}, "~": r"\textasciitilde{}", "\\": r"\textbackslash{}"}
)


def latex_tables(folders: Sequence[str | Path]) -> str:
    r"""One `table` with a `tabular` (booktabs) a benchmark: scores, mean, points and ratio against the unpruned model.

    Raises:
        ReportError: a folder holds no benchmark.
    """
    tables = "\n".join(_table(read_bench(folder)) for folder in run_folders(folders))
    return "% needs \\usepackage{booktabs}\n" + tables


def escaped(text: str) -> str:
    """Text with the marks that LaTeX reads as commands made plain."""
    return text.translate(_SPECIAL)


def _table(run: Mapping[str, Any]) -> str:
    names = list(run["cells"][0]["tasks"])
    head = ["method", "keep", "tokens", *short_names(names), "mean", "points (95\\,\\%)", "of full (95\\,\\%)"]
    lines = [" & ".join([escaped(name) for name in head[:-2]] + head[-2:])]
    lines += [" & ".join(_line(cell, names)) for cell in run["cells"]]
    body = " \\\\\n".join([lines[0] + " \\\\\n\\midrule\n" + lines[1], *lines[2:]])
    caption = (
        f"{escaped(model_name(run))}: accuracy in per cent; against the unpruned model on the same items, "
        "with 95\\,\\% intervals for small samples."
    )
    columns = "ll" + "r" * (len(head) - 2)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body} \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def _line(cell: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    paired = cell.get("paired") or {}
    scores = [percent(cell["tasks"][name]["score"]) for name in names]
    points = "--"
    if paired.get("difference_95"):
        low, high = paired["difference_95"]
        points = f"${100 * paired['difference']:+.1f}$ (${100 * low:+.1f}$ to ${100 * high:+.1f}$)"
    ratio = "--"
    if paired.get("ratio_95"):
        low, high = paired["ratio_95"]
        ratio = f"{percent(paired['ratio'])} ({percent(low)} to {percent(high)})"
    tokens = f"{cell['cost']['visual_tokens_after']:.0f}"
    return [escaped(cell["title"]), keep_text(cell["keep"]), tokens, *scores, percent(cell["average"]), points, ratio]
