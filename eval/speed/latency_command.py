"""The latency command: every cell at every batch size and picture size, tables and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel

from vlmprune.eval.models.synthetic_request import for_model, synthetic_request
from vlmprune.eval.run.cells import FULL, Cell
from vlmprune.eval.run.csv_lines import flattened, write_csv
from vlmprune.eval.run.figures import keep_text, median_text, three_figures, with_quartiles
from vlmprune.eval.run.machine import describe_machine
from vlmprune.eval.run.progress import progress_bar
from vlmprune.eval.run.ranks import Ranks
from vlmprune.eval.run.result_folder import ResultFolder, read_json, write_json
from vlmprune.eval.run.table_style import cost_style

from .latency import Measurement, measure


@dataclass(frozen=True)
class LatencyOptions:
    """What `run_latency` measures; `seconds` is the time for each batch size and picture size (width, height).

    With `video_frames` a request holds a video of so many frames of that size and no picture.
    """

    cells: Sequence[Cell]
    batch_sizes: Sequence[int]
    image_sizes: Sequence[tuple[int, int]]
    text_tokens: int
    new_tokens: int
    seconds: float
    out: Path | None = None
    video_frames: int = 0


def run_latency(
    model: PreTrainedModel,
    name: str,
    options: LatencyOptions,
    image_processor: Any = None,
    console: Console | None = None,
) -> list[Measurement]:
    """Measure every cell at every batch size and picture size, print a table for each, write latency.json and latency.csv.

    `image_processor` is the checkpoint's; by default one with the sizes of the model's configuration. Each table is stored
    as soon as it is measured, and is not measured again. Of several processes all measure at the same time and must agree on
    what was kept; the first prints and writes its own times.
    """
    ranks = Ranks()
    console = console or Console(stderr=True, quiet=not ranks.is_main)
    configuration = {
        "kind": "latency",
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "cells": [cell.label for cell in options.cells],
        "text_tokens": options.text_tokens,
        "new_tokens": options.new_tokens,
        "processes": ranks.count,
    }
    if options.video_frames:
        configuration["video_frames"] = options.video_frames
    ranks.require_same("the configuration", {**configuration, "sizes": [options.batch_sizes, options.image_sizes]})
    folder = ranks.on_main(lambda: ResultFolder(options.out, configuration) if options.out is not None else None)
    output = Console(width=100, quiet=not ranks.is_main)
    found: list[Measurement] = []
    for batch_size, image_size in ((batch, size) for size in options.image_sizes for batch in options.batch_sizes):
        file = folder.path / "parts" / f"{image_size[0]}x{image_size[1]}-batch-{batch_size}.json" if folder else None
        part = ranks.on_main(partial(_stored, file))
        if part is None:
            part = _measure_part(model, options, batch_size, image_size, image_processor, console)
            ranks.require_same("what was kept", [_counts(row) for row in part])
            if ranks.is_main and file is not None:
                write_json(file, {"machine": describe_machine(), "rows": [asdict(row) for row in part]})
        found.extend(part)
        if part:
            output.print(latency_table(part))
            output.print()
            output.print(quartile_table(part))
            output.print()
    if ranks.is_main and folder is not None:
        write_json(
            folder.path / "latency.json",
            {"machine": describe_machine(), **configuration, "rows": [asdict(row) for row in found]},
        )
        write_csv(folder.path / "latency.csv", [_line(row) for row in found])
        output.print(f"Written to {folder.path}", soft_wrap=True)
    ranks.close()
    return found


def _measure_part(
    model: PreTrainedModel,
    options: LatencyOptions,
    batch_size: int,
    image_size: tuple[int, int],
    image_processor: Any,
    console: Console,
) -> list[Measurement]:
    request = synthetic_request(
        model.config, image_size, options.text_tokens, batch_size, image_processor, video_frames=options.video_frames
    )
    inputs = for_model(request, model)
    with progress_bar(console) as progress:
        title = f"{_shown(image_size, options.video_frames)}, batch size {batch_size}, rounds over {len(options.cells)} cells"
        bar = progress.add_task(title, total=None)
        rows = measure(
            model,
            inputs,
            image_size,
            options.cells,
            options.new_tokens,
            options.seconds,
            partial(_show, progress, bar),
            lambda cell: console.print(cell.note, markup=False, soft_wrap=True),
        )
    return [replace(row, video_frames=options.video_frames) for row in rows]


def _shown(image_size: tuple[int, int], video_frames: int) -> str:
    size = f"{image_size[0]} x {image_size[1]}"
    return f"{video_frames} frames of {size}" if video_frames else size


def _show(progress: Progress, bar: Any, done: int, rounds: int) -> None:
    progress.update(bar, completed=done, total=rounds)


def _stored(file: Path | None) -> list[Measurement] | None:
    if file is None or not file.exists():
        return None
    return [Measurement(**{**row, "image_size": tuple(row["image_size"])}) for row in read_json(file)["rows"]]


def _counts(row: Measurement) -> tuple[Any, ...]:
    return row.title, row.keep, row.visual_tokens_before, row.visual_tokens_after, row.kv_cache_bytes


def _line(row: Measurement) -> dict[str, Any]:
    return flattened({**asdict(row), "image_size": "x".join(map(str, row.image_size))}, digits=6)


def latency_table(rows: Sequence[Measurement]) -> Table:
    """Medians in milliseconds, or seconds where these are many.

    "select" is what the prefill takes beyond the ideal one, "+GiB" the peak of memory above what was in use before the request.
    """
    first = rows[0]
    unit, divisor = _unit(rows)
    table = cost_style(
        f"{_shown(first.image_size, first.video_frames)} pixels ({first.visual_tokens_before} visual tokens), "
        f"{first.text_tokens} text tokens, batch size {first.batch_size}: {unit}, medians of {first.rounds} rounds"
    )
    table.add_column("method", no_wrap=True, max_width=16)
    for name in ("keep", "tokens", "tower", "select", "prefill", "over", "TTFT", "/token", "all", "KV MiB", "+GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        times = (row.vision, row.selection, row.prefill, row.first_token, row.decode_per_token, row.end_to_end)
        tower, select, prefill, first_token, decode, whole = (median_text(part, divisor) for part in times)
        table.add_row(
            row.title,
            keep_text(row.keep),
            f"{row.visual_tokens_after:.0f}",
            tower,
            "none" if row.title == FULL else select,
            prefill,
            f"{row.overhead['median']:.2f}x",
            first_token,
            decode,
            whole,
            three_figures(row.kv_cache_bytes / 2**20),
            "unknown" if row.peak_bytes is None else three_figures(row.peak_bytes / 2**30),
            end_section=following is None or following.title != row.title,
        )
    return table


def quartile_table(rows: Sequence[Measurement]) -> Table:
    """Between what the middle half of the rounds lies, in the unit of `latency_table`."""
    unit, divisor = _unit(rows)
    table = cost_style(f"Quartiles of the same times: {unit}")
    table.add_column("method", no_wrap=True, max_width=16)
    for name in ("keep", "tower", "select", "prefill", "TTFT", "/token", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        times = (row.vision, row.selection, row.prefill, row.first_token, row.decode_per_token, row.end_to_end)
        texts = [with_quartiles(part, divisor).partition("(")[2].rstrip(")") for part in times]
        texts[1] = "none" if row.title == FULL else texts[1]
        last = following is None or following.title != row.title
        table.add_row(row.title, keep_text(row.keep), *texts, end_section=last)
    return table


def _unit(rows: Sequence[Measurement]) -> tuple[str, float]:
    return ("s", 1e3) if max(row.end_to_end["median"] for row in rows) >= 1e5 else ("ms", 1.0)
