"""Times of a benchmark's cells on its own requests, at every batch size asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.task_index import documents_of
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.run.progress import progress_bar
from vlmprune.eval.run.result_folder import read_json, write_json
from vlmprune.eval.speed.cell_times import time_cells

REQUESTS = 5
"""Requests that take turns at each batch size."""

Turn = tuple[str, Sequence[Any]]


def turns_of_tasks(tasks: Mapping[str, Any], limit: int | None, count: int) -> list[Turn]:
    """Text and pictures of `count` items, spread evenly over the items of all tasks that a run answers."""
    found: list[Turn] = []
    for place, task in enumerate(tasks.values()):
        documents = documents_of(task)
        items = len(documents) if limit is None else min(limit, len(documents))
        share = count // len(tasks) + (place < count % len(tasks))
        for number in range(min(share, items)):
            document = documents[number * items // share]
            found.append((str(task.doc_to_text(document)), task.doc_to_visual(document) or []))
    return found


def timed_cells(
    live: LiveModel,
    turns: Callable[[int], Sequence[Turn]],
    cells: Sequence[Cell],
    batch_sizes: Sequence[int],
    seconds: float,
    file: Path,
    console: Console,
) -> dict[str, Any]:
    """Times by cell label, those of the first batch size and under "batches" those of each.

    They are measured anew unless `file` has them all: times of different runs must not be compared.

    Args:
        live: the model, without a method.
        turns: gives as many different requests as it is asked for, or fewer if there are no more.
        cells: what is timed.
        batch_sizes: rows of a request.
        seconds: time for everything.
        file: where the times are kept.
        console: for the progress bar.
    """
    stored: dict[str, Any] = read_json(file) if file.exists() else {}
    sizes = [str(size) for size in batch_sizes]
    if all(set(sizes) <= set((stored.get(cell.label) or {}).get("batches", {})) for cell in cells):
        return stored
    found: dict[str, dict[str, Any]] = {}
    with progress_bar(console) as progress:
        for size in batch_sizes:
            bar = progress.add_task(f"{f'timing, batch size {size}':<32}", total=None)
            different = turns(REQUESTS * size)
            rows = list(islice(cycle(different), max(len(different), size) // size * size))
            groups = [rows[start : start + size] for start in range(0, len(rows), size)]
            found[str(size)] = time_cells(
                live.model,
                lru_cache(len(cells))(partial(_encoded, live, groups)),
                cells,
                seconds / len(batch_sizes),
                lambda done, rounds, bar=bar: progress.update(bar, completed=done, total=rounds),  # type: ignore[misc]
            )
    timing = {
        cell.label: {**found[sizes[0]][cell.label], "batches": {size: found[size][cell.label] for size in sizes}}
        for cell in cells
    }
    write_json(file, timing)
    return timing


def _encoded(live: LiveModel, groups: Sequence[Sequence[Turn]], cell: Cell) -> list[dict[str, Any]]:
    live.resolution = cell.resolution(live.model, live.processor)
    return [live.encode_turns(group) for group in groups]
