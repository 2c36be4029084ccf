"""One Markdown table of several benchmarks: what every method keeps of each model's accuracy, and what it beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune.eval.run.figures import keep_text

from .html_page import written
from .stored_results import model_name, read_bench, run_folders

LEGEND = (
    "Mean accuracy in per cent of the unpruned model's mean. **Bold**: better than every baseline that the model serves at "
    "this budget; *italic*: worse than at least one; plain: these items do not tell (exact sign tests on the same items, "
    "5 % false discovery rate over all comparisons of a model)."
)


def write_comparison(folders: Sequence[str | Path], file: str | Path) -> Path:
    """Write the Markdown table of several finished benchmarks to `file`.

    Raises:
        ReportError: a folder holds no results of a benchmark of this version, or the file cannot be written.
    """
    runs = [read_bench(folder) for folder in run_folders(folders)]
    columns = [(run, keep) for run in runs for keep in _keeps(run)]
    methods = list(dict.fromkeys(cell["title"] for run in runs for cell in run["cells"] if cell["keep"] is not None))
    names = [model_name(run) for run in runs]
    first = [
        "model",
        *(name for run, name in zip(runs, names, strict=True) for name in (name, *[""] * (len(_keeps(run)) - 1))),
    ]
    lines = [first, ["---", *["---:"] * len(columns)], ["keep", *(keep_text(keep) for _, keep in columns)]]
    lines += [[f"`{method}`", *(_entry(run, method, keep) for run, keep in columns)] for method in methods]
    unpruned = "; ".join(
        f"{name} {100 * run['cells'][0]['average']:.1f} %" for run, name in zip(runs, names, strict=True)
    )
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return written(f"{LEGEND} Unpruned: {unpruned}.\n\n{body}\n", file)


def _keeps(run: Mapping[str, Any]) -> list[float]:
    return list(dict.fromkeys(cell["keep"] for cell in run["cells"] if cell["keep"] is not None))


def _entry(run: Mapping[str, Any], method: str, keep: float) -> str:
    cell = next((cell for cell in run["cells"] if (cell["title"], cell["keep"]) == (method, keep)), None)
    full = run["cells"][0]["average"]
    if cell is None or not full:
        return "not run" if full else "full is 0"
    text = f"{100 * cell['average'] / full:.0f}"
    pairs = [pair for pair in run["against_baselines"] if (pair["method"], pair["keep"]) == (method, keep)]
    verdicts = {pair["verdict"] for pair in pairs}
    if "worse" in verdicts:
        return f"*{text}*"
    return f"**{text}**" if verdicts == {"better"} else text
