"""What selecting visual tokens costs, as a share of the prefill time that dropping them saves."""

from __future__ import annotations

import csv
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import vlmprune
from vlmprune.errors import BudgetError
from vlmprune.eval.models.loading import pick_device
from vlmprune.eval.models.memory import require_memory
from vlmprune.eval.models.random_weights import build_random, preset_config, preset_image_processor, random_dtype
from vlmprune.eval.models.synthetic_request import parse_sizes, synthetic_request
from vlmprune.eval.reports.tables import cost_style, three_figures
from vlmprune.eval.run.cells import Cell, LeftOut, not_reachable
from vlmprune.eval.run.machine import describe_machine
from vlmprune.methods.registry import make_method

from .cell_times import spread
from .hook_clock import HookClock
from .ideal_prefill import IdealPrefill, encode_images

TOWER_LAYERS = 2
REPEATS = 2


@dataclass(frozen=True)
class SelectionCost:
    """One method. Times are milliseconds (median and quartiles) of the language model's prefill, tower and projector excluded.

    `selection`: all that the method adds to a call (reading the tower, scores, picking, compaction, handing back);
    `full` and `pruned` prefill, the latter with the selection; `saved` their difference; `share` selection over saved;
    `ideal` the unpatched layers on the tokens that each of them sees; `overhead` pruned over ideal.
    """

    title: str
    keep: float | int | None
    visual_tokens_before: int
    visual_tokens_after: float
    text_tokens: int
    selection: dict[str, float]
    full: dict[str, float]
    pruned: dict[str, float]
    ideal: dict[str, float]
    saved: dict[str, float]
    share: dict[str, float]
    overhead: dict[str, float]
    rounds: int


def measure_selection(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    cells: Sequence[Cell],
    rounds: int,
    on_left_out: Callable[[LeftOut], None] | None = None,
) -> list[SelectionCost]:
    """Measure every cell on one request, in rounds over all cells.

    A method that acts before the language model is measured with its layers taken out, which do the same whoever chose the
    tokens; its prefill is that of the layers on as many tokens, timed once a round for all methods that keep as many, and its
    selection. A method that drops inside is measured in the whole call, and its ideal right after. A cell whose budget the
    request does not allow is left out, and `on_left_out` told.
    """
    bench = _SelectionBench(model, inputs, cells)
    order = random.Random(0)
    with torch.inference_mode():
        for _ in range(rounds):
            bench.round(order.sample(bench.cells, len(bench.cells)))
    for item in bench.left_out:
        if on_left_out is not None:
            on_left_out(item)
    return bench.results()


class _SelectionBench:
    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor], cells: Sequence[Cell]) -> None:
        self.model, self.inputs = model, inputs
        self.cells = [cell for cell in cells if not cell.is_full]
        self.clock = HookClock(model.device)
        self.visual = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
        self.depth = int(model.config.get_text_config().num_hidden_layers)
        self.encoded: Any = None
        self.full: list[float] = []
        self.times: dict[str, list[tuple[float, float, float]]] = {cell.label: [] for cell in self.cells}
        self.layers: dict[str, list[int]] = {}
        self.left_out: list[LeftOut] = []

    def round(self, cells: Sequence[Cell]) -> None:
        if self.encoded is None:
            self.encoded = encode_images(self.model, self.inputs)
        self.full.append(self._layers_alone([self.visual] * self.depth))
        alone: dict[tuple[int, ...], float] = {}
        for cell in cells:
            inside = _drops_inside(cell)
            try:
                selection, pruned = self._pruned(cell, inside)
            except BudgetError as error:
                self.cells.remove(cell)
                self.left_out.append(not_reachable(cell, error))
                continue
            kept = tuple(self.layers[cell.label])
            if inside or kept not in alone:
                alone[kept] = self._layers_alone(kept)
            self.times[cell.label].append((selection, pruned if inside else alone[kept] + selection, alone[kept]))

    def _pruned(self, cell: Cell, inside: bool) -> tuple[float, float]:
        with cell.applied_to(self.model), self.clock.watching(self.model):
            if inside:
                times = self._call()
            else:
                with without_layers(self.model):
                    if not self.times[cell.label]:
                        self._call()
                    times = statistics.median(self._call()[0] for _ in range(REPEATS)), 0.0
            self.layers[cell.label] = vlmprune.last_run(self.model).visual_tokens_per_layer[0]
        return times

    def _call(self) -> tuple[float, float]:
        """Seconds in hooks, and of the whole call without the tower."""
        self.clock.reset()
        whole = self._timed(lambda: self.model(**self.inputs, use_cache=True, logits_to_keep=1))
        return self.clock.in_hooks, whole - self.clock.in_tower

    def _layers_alone(self, visual_tokens: Sequence[int]) -> float:
        ideal = IdealPrefill.prepare(self.model, self.inputs, visual_tokens)
        return self._timed(lambda: ideal.after_tower(self.encoded))

    def _timed(self, call: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def results(self) -> list[SelectionCost]:
        found = []
        for cell in self.cells:
            selection, pruned, ideal = zip(*self.times[cell.label], strict=True)
            saved = [full - after for full, after in zip(self.full, pruned, strict=True)]
            shares = [cost / gain if gain > 0 else float("inf") for cost, gain in zip(selection, saved, strict=True)]
            found.append(
                SelectionCost(
                    title=cell.title,
                    keep=cell.keep,
                    visual_tokens_before=self.visual,
                    visual_tokens_after=statistics.fmean(self.layers[cell.label]),
                    text_tokens=self.inputs["input_ids"].shape[1] - self.visual,
                    selection=spread(selection),
                    full=spread(self.full),
                    pruned=spread(pruned),
                    ideal=spread(ideal),
                    saved=spread(saved),
                    share={key: value / 1e3 for key, value in spread(shares).items()},
                    overhead={
                        key: value / 1e3
                        for key, value in spread(
                            [after / least for after, least in zip(pruned, ideal, strict=True)]
                        ).items()
                    },
                    rounds=len(self.full),
                )
            )
        return found


def _drops_inside(cell: Cell) -> bool:
    method = make_method(cell.method, cell.keep, **dict(cell.parameters))
    return any(part.site == "layer" for part in method.parts())


@contextmanager
def without_layers(model: PreTrainedModel) -> Iterator[None]:
    """The language model without its decoder layers while the context lasts."""
    language: Any = model.model.language_model
    layers = language.layers
    language.layers = nn.ModuleList()
    try:
        yield
    finally:
        language.layers = layers


def with_short_tower(config: PreTrainedConfig, layers: int = TOWER_LAYERS) -> PreTrainedConfig:
    """`config` with that many layers in a CLIP or SigLIP tower: they run alike with and without pruning, and cost time here."""
    vision = config.vision_config
    if hasattr(vision, "num_hidden_layers"):
        vision.num_hidden_layers = min(vision.num_hidden_layers, layers)
    return config


def write_selection_csv(path: Path, rows: Sequence[SelectionCost], about: dict[str, Any]) -> None:
    """One line a method and request, medians and quartiles, `about` in columns of its own."""
    machine = describe_machine()
    described = {**about, "cpu": machine["cpu"], "threads": machine["torch_threads"], "date": machine["date"]}
    lines = []
    for row in rows:
        line: dict[str, Any] = {}
        for key, value in asdict(row).items():
            unit = "" if key in ("share", "overhead") else "_ms"
            if isinstance(value, dict):
                line.update({f"{key}{unit}_{part}": f"{number:.4g}" for part, number in value.items()})
            else:
                line[key] = value
        lines.append({**line, **described})
    names = list(dict.fromkeys(name for line in lines for name in line))
    exists = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerows(lines)


def selection_table(rows: Sequence[SelectionCost]) -> Table:
    """Milliseconds, and the share in percent with its quartiles."""
    first = rows[0]
    table = cost_style(
        f"{first.visual_tokens_before} visual and {first.text_tokens} text tokens, full prefill "
        f"{three_figures(first.full['median'])} ms; ms, medians of {first.rounds} rounds"
    )
    table.add_column("method", no_wrap=True, max_width=20)
    for name in ("keep", "tokens", "select", "prefill", "saved", "share %", "quartiles", "over"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.title,
            "-" if row.keep is None else f"{row.keep:g}",
            f"{row.visual_tokens_after:.0f}",
            *(three_figures(part["median"]) for part in (row.selection, row.pruned, row.saved)),
            f"{100 * row.share['median']:.2f}",
            f"{100 * row.share['q25']:.2f} to {100 * row.share['q75']:.2f}",
            f"{row.overhead['median']:.3f}x",
        )
    return table


def open_request(
    name: str, dtype: str, device: str, image_sizes: str, text_tokens: int
) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A preset with random weights and a short tower, and a request for each picture size of `"336,640x480"`.

    Raises `UnknownNameError` for a name that is none, `ParameterError` for bad sizes, `DeviceError` where it does not fit.
    """
    sizes = parse_sizes(image_sizes)
    config, target = with_short_tower(preset_config(name)), pick_device(device)
    require_memory(name, config, random_dtype(dtype), target, 1, max(sizes, key=prod), text_tokens)
    model = build_random(config, dtype, device)
    processor = preset_image_processor(name)
    requests = [synthetic_request(config, size, text_tokens, 1, processor) for size in sizes]
    return model, [
        {
            key: value.to(target, model.dtype if value.is_floating_point() else value.dtype)
            for key, value in request.items()
        }
        for request in requests
    ]


def run_selection_cost(
    model: PreTrainedModel,
    requests: Sequence[dict[str, Tensor]],
    cells: Sequence[Cell],
    rounds: int,
    out: Path | None,
    name: str,
    console: Console | None = None,
) -> list[SelectionCost]:
    """Measure all cells on every request, print a table for each, and add their lines to the CSV file `out`."""
    output = console or Console(width=100)
    found: list[SelectionCost] = []
    about = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    for inputs in requests:
        part = measure_selection(
            model, inputs, cells, rounds, lambda item: output.print(item.note, soft_wrap=True, markup=False)
        )
        found.extend(part)
        if not part:
            continue
        output.print(selection_table(part))
        output.print()
        if out is not None:
            write_selection_csv(out, part, about)
    return found
