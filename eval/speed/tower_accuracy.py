"""Accuracy of a trained model against the measured time of its vision tower.

    python -m vlmprune.eval.speed.tower_accuracy --model tiny-llava --results results/results.csv --out tower_accuracy.csv

Takes the accuracy of every row of a finished `vlmprune bench` whose method makes the tower cheaper, and measures the tower and
projector under that method on pictures of the same tasks, in rounds over all rows.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from vlmprune.budget import Keep
from vlmprune.errors import BudgetError, ParameterError
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.task_index import find_tasks
from vlmprune.eval.accuracy.task_scores import quiet_lmms_eval
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.lower_resolution import LOWER_RESOLUTION
from vlmprune.eval.run.cells import FULL, Cell, parse_keeps, parse_methods
from vlmprune.eval.run.csv_lines import add_to_csv, flattened, this_run
from vlmprune.eval.run.table_style import cost_style
from vlmprune.methods.encoder_method import EncoderMethod
from vlmprune.methods.needs import PIXELS

from .ideal_prefill import encode_images
from .rounds import run_rounds, spread, worked


@dataclass(frozen=True)
class TowerAccuracy:
    """One row of a benchmark with the time of its tower.

    Attributes:
        method: its title, "full" for the unpatched tower.
        keep: its budget, as the benchmark has it.
        relative: accuracy as a share of the unpruned model's.
        gflops: of the tower with what reducing costs, counted, mean of the benchmark's requests.
        time: milliseconds of tower and projector for a picture, on a CPU those that its threads work: median and quartiles.
        speedup: how many times faster than the unpatched tower of the same round: median and quartiles.
        rounds: how many of them.
    """

    method: str
    keep: str
    relative: float
    gflops: float
    time: dict[str, float]
    speedup: dict[str, float]
    rounds: int


def tower_cells(lines: Sequence[Mapping[str, str]]) -> list[tuple[Cell, Mapping[str, str]]]:
    """Return the rows of a results.csv that are the unpruned model or make its tower cheaper, as cells."""
    found: list[tuple[Cell, Mapping[str, str]]] = []
    for line in lines:
        keep: Keep | None = parse_keeps(line["keep"])[0] if line["keep"] else None
        if line["method"] in (FULL, LOWER_RESOLUTION):
            found.append((Cell(line["method"], keep), line))
            continue
        ((name, parameters),) = parse_methods(line["method"])
        cell = Cell(name, keep, tuple(sorted(parameters.items())))
        if _spares_the_tower(cell):
            found.append((cell, line))
    if not found or not found[0][0].is_full:
        raise ParameterError("The results have no row of the unpruned model in front; run `vlmprune bench` once more.")
    return found


def _spares_the_tower(cell: Cell) -> bool:
    method = cell.make_method()
    parts = () if method is None else method.parts()
    return any(isinstance(part, EncoderMethod) or PIXELS in part.needs for part in parts)


def measure_cells(
    model: PreTrainedModel,
    cells: Sequence[Cell],
    inputs_of: Callable[[Cell], Sequence[Mapping[str, Any]]],
    seconds: float,
    most: int = 30,
) -> list[list[float]]:
    """Seconds of encoding a picture under every cell, one value a round; the model is as before afterwards.

    Args:
        model: the model.
        cells: what is compared.
        inputs_of: the processor's output for each picture, as a cell asks for it.
        seconds: time for everything.
        most: the highest number of rounds.
    """
    inputs = [inputs_of(cell) for cell in cells]
    times: list[list[float]] = [[] for _ in cells]

    def visit(index: int, counts: bool) -> bool:
        with cells[index].applied_to(model):
            # One untimed picture after a method is put on.
            encode_images(model, inputs[index][0])
            took = [worked(partial(encode_images, model, given), model.device) for given in inputs[index]]
        if counts:
            times[index].append(sum(took) / len(took))
        return True

    with torch.inference_mode():
        run_rounds(range(len(cells)), visit, seconds, most)
    return times


def join(rows: Sequence[tuple[Cell, Mapping[str, str]]], times: Sequence[Sequence[float]]) -> list[TowerAccuracy]:
    """Put accuracy, FLOPs and times of the same cells together; the unpatched tower comes first."""
    joined = []
    for (cell, line), own in zip(rows, times, strict=True):
        ratios = [full / mine for full, mine in zip(times[0], own, strict=True)]
        joined.append(
            TowerAccuracy(
                method=cell.title,
                keep=line["keep"],
                relative=float(line["relative"]),
                gflops=float(line["gflops_vision"]) + float(line["gflops_selection"] or 0),
                time=spread(own),
                speedup=spread(ratios, 1),
                rounds=len(own),
            )
        )
    return joined


def accuracy_table(rows: Sequence[TowerAccuracy], name: str) -> Table:
    """Accuracy beside counted and measured cost of the tower."""
    table: Table = cost_style(f"{name}: accuracy and its vision tower, medians of {rows[0].rounds} rounds")
    for column in ("method", "keep", "of full %", "GFLOPs", "fewer", "ms", "faster", "quartiles"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            row.keep or "-",
            f"{100 * row.relative:.0f}",
            f"{row.gflops:.2f}",
            f"{rows[0].gflops / row.gflops:.2f}x",
            f"{row.time['median']:.2f}",
            f"{row.speedup['median']:.2f}x",
            f"{row.speedup['q25']:.2f} to {row.speedup['q75']:.2f}",
        )
    return table


def main(
    model: Annotated[str, typer.Option(help="Shipped model, local folder or hub name.")],
    results: Annotated[Path, typer.Option(help="results.csv of a finished vlmprune bench of that model.")],
    task: Annotated[
        str, typer.Option(help="The lmms-eval task whose first pictures are encoded.")
    ] = "scenes_existence",
    pictures: Annotated[int, typer.Option(min=1, help="How many of them.")] = 4,
    seconds: Annotated[float, typer.Option(min=0, help="Time to spend.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="CSV file to which the lines are added.")] = None,
) -> None:
    """Join a benchmark's accuracy with measured times of the vision tower."""
    with results.open(encoding="utf-8", newline="") as file:
        rows = tower_cells(list(csv.DictReader(file)))
    loaded = load_model(model)
    with quiet_lmms_eval():
        (found,) = find_tasks([task], loaded.model.config.model_type).values()
    source = found.test_docs() if found.has_test_docs() else found.validation_docs()
    documents = [source[number] for number in range(min(pictures, len(source)))]

    def inputs_of(cell: Cell) -> list[dict[str, Any]]:
        live = LiveModel(loaded.model, loaded.processor, resolution=cell.resolution(loaded.model, loaded.processor))
        return [live.encode_turns([(str(found.doc_to_text(each)), found.doc_to_visual(each))]) for each in documents]

    def served(cell: Cell) -> bool:
        try:
            with cell.applied_to(loaded.model):
                return True
        except BudgetError:
            return False

    rows = [row for row in rows if served(row[0])]
    times = measure_cells(loaded.model, [cell for cell, _ in rows], inputs_of, seconds)
    joined = join(rows, times)
    Console(width=110).print(accuracy_table(joined, model))
    if out is not None:
        about = {"model": model, "device": loaded.model.device.type, **this_run()}
        add_to_csv(out, [{**flattened(asdict(row), 4, "_ms", ("speedup",)), **about} for row in joined])


if __name__ == "__main__":
    typer.run(main)
