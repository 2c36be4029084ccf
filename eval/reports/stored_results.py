"""Finished benchmarks as they lie in folders: which there are, and what plots and LaTeX tables need of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.eval.run.figures import keep_text
from vlmprune.eval.run.result_folder import read_json

from .plots import Point, plot_pareto

RESULT_FILES = ("results.json", "fidelity.json", "latency.json")
COSTS = {
    "flops": "GFLOPs until the first token (vision tower, projector, language model)",
    "prefill_time": "milliseconds until the first token",
    "kv_cache": "MiB of keys and values (one sequence)",
}
"""What accuracy is drawn against, with the label of the axis."""


class ReportError(VlmpruneError, ValueError):
    """A folder holds nothing that a report could show, or a report cannot be written."""


def run_folders(folders: Sequence[str | Path]) -> list[Path]:
    """The folders of runs among `folders` and, where one is none itself, below it.

    Raises:
        ReportError: one holds no results.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        inside = [folder] if _has_results(folder) else sorted(path for path in folder.rglob("*/") if _has_results(path))
        if not inside:
            raise ReportError(
                f"{str(folder)!r} holds none of {', '.join(RESULT_FILES)}; a run that was broken off has to be finished first."
            )
        found += inside
    return list(dict.fromkeys(found))


def _has_results(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RESULT_FILES)


def read_bench(folder: Path) -> dict[str, Any]:
    """The results of a finished `vlmprune bench`.

    Raises:
        ReportError: there are none of this version.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise ReportError(f"{str(folder)!r} holds no results.json; name folders of finished `vlmprune bench` runs.")
    run: dict[str, Any] = read_json(file)
    if not isinstance(run, dict) or not run.get("cells") or "against_baselines" not in run:
        raise ReportError(f"{str(file)!r} was written by an older version; run the same `vlmprune bench` once more.")
    return run


def model_name(run: Mapping[str, Any]) -> str:
    """The last part of the model's folder or hub name."""
    return str(run["configuration"]["model"]["source"]).rstrip("/").split("/")[-1]


def points_of(cells: Sequence[Mapping[str, Any]], cost: str) -> list[Point]:
    """Points of stored cells against one of `COSTS`; none where some cell was not measured."""
    points = []
    for cell in cells:
        value = _cost(cell, cost)
        if value is None:
            return []
        low, high = (cell.get("paired") or {}).get("difference_95") or (0.0, 0.0)
        points.append(Point(cell["title"], keep_text(cell["keep"]), value, cell["average"], (high - low) / 2))
    return points


def _cost(cell: Mapping[str, Any], cost: str) -> float | None:
    if cost == "flops":
        return float(cell["cost"]["flops"]["prefill_total"] or 0.0) / 1e9
    if cost == "kv_cache":
        return float(cell["cost"]["kv_cache_bytes"]) / 2**20
    return float(cell["timing"]["prefill_ms"]["median"]) if cell.get("timing") else None


def write_plot(folders: Sequence[str | Path], file: Path) -> list[Path]:
    """Plot accuracy against FLOPs of every benchmark; several are numbered after the file's stem.

    Raises:
        ReportError: a folder holds no benchmark.
        ResultFolderError: a file cannot be written.
    """
    runs = [read_bench(folder) for folder in run_folders(folders)]
    file.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for number, run in enumerate(runs, start=1):
        target = file if len(runs) == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        plot_pareto(points_of(run["cells"], "flops"), target, COSTS["flops"], model_name(run))
        written.append(target)
    return written
