"""Cells that were run with several seeds, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any


def merge_seeds(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Put cells that repeat another one with other seeds into that one: scores become means, of items too.

    The merged cell has `seeds`, the average of each. A repetition that did not answer the same tasks, or whose first cell is
    missing, stays a cell of its own.
    """
    merged: list[Mapping[str, Any]] = []
    for result in results:
        if result.get("repeats") and any(_same_run(result, other) for other in results):
            continue
        repetitions = [other for other in results if _same_run(other, result)]
        merged.append(_mean_of([result, *repetitions]) if repetitions else result)
    return merged


def _same_run(repetition: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    return repetition.get("repeats") == first["label"] and repetition["tasks"].keys() == first["tasks"].keys()


def _mean_of(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = results[0]["tasks"]
    return {
        **results[0],
        "tasks": {name: _mean_task([result["tasks"][name] for result in results]) for name in names},
        "seeds": [fmean(task["score"] for task in result["tasks"].values()) for result in results],
    }


def _mean_task(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores: list[dict[Any, Any]] = [{s["doc_id"]: s["score"] for s in task["samples"]} for task in tasks]
    samples = [
        {**sample, "score": _mean([by_item.get(sample["doc_id"]) for by_item in scores])}
        for sample in tasks[0]["samples"]
    ]
    return {**tasks[0], "score": fmean(task["score"] for task in tasks), "samples": samples}


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return fmean(known) if len(known) == len(scores) else None
