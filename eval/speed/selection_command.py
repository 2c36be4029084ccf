"""The selection-cost command: a preset with random weights, every cell on every request, tables and a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vlmprune.eval.models.loading import pick_device
from vlmprune.eval.models.memory import require_memory
from vlmprune.eval.models.random_weights import build_random, preset_config, preset_image_processor, random_dtype
from vlmprune.eval.models.synthetic_request import for_model, parse_sizes, synthetic_request
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.run.csv_lines import add_to_csv, flattened, this_run
from vlmprune.eval.run.figures import keep_text, median_text, with_quartiles
from vlmprune.eval.run.table_style import cost_style

from .selection_cost import SelectionCost, measure_selection

TOWER_LAYERS = 2


def with_short_tower(config: PreTrainedConfig, layers: int = TOWER_LAYERS) -> PreTrainedConfig:
    """`config` with that many layers in a CLIP or SigLIP tower: they run alike with and without pruning, and cost time here."""
    vision = config.vision_config
    if hasattr(vision, "num_hidden_layers"):
        vision.num_hidden_layers = min(vision.num_hidden_layers, layers)
    return config


def write_selection_csv(path: Path, rows: Sequence[SelectionCost], about: dict[str, Any]) -> None:
    """One line a method and request, medians and quartiles, `about` in columns of its own."""
    described = {**about, **this_run()}
    ratios = ("share", "overhead")
    add_to_csv(path, [{**flattened(asdict(row), 4, "_ms", ratios), **described} for row in rows])


def selection_table(rows: Sequence[SelectionCost]) -> Table:
    """Milliseconds, and the share in percent with its quartiles."""
    first = rows[0]
    table = cost_style(
        f"{first.visual_tokens_before} visual and {first.text_tokens} text tokens, full prefill "
        f"{median_text(first.full)} ms; ms, medians (quartiles) of {first.rounds} rounds"
    )
    table.add_column("method", no_wrap=True, max_width=20)
    for name in ("keep", "tokens", "select", "prefill", "saved", "share %", "quartiles", "over"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.title,
            keep_text(row.keep),
            f"{row.visual_tokens_after:.0f}",
            *(with_quartiles(part).replace(" ", "\n", 1) for part in (row.selection, row.pruned, row.saved)),
            f"{100 * row.share['median']:.2f}",
            f"{100 * row.share['q25']:.2f} to {100 * row.share['q75']:.2f}",
            f"{row.overhead['median']:.3f}x",
        )
    return table


def open_request(
    name: str, dtype: str, device: str, image_sizes: str, text_tokens: int
) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A preset with random weights and a short tower, and a request for each picture size of `"336,640x480"`.

    Raises:
        UnknownNameError: there is no preset of that name.
        ParameterError: the sizes are none.
        DeviceError: the model does not fit.
    """
    sizes = parse_sizes(image_sizes)
    config, target = with_short_tower(preset_config(name)), pick_device(device)
    require_memory(name, config, random_dtype(dtype), target, 1, max(sizes, key=prod), text_tokens)
    model = build_random(config, dtype, device)
    processor = preset_image_processor(name)
    requests = [synthetic_request(config, size, text_tokens, 1, processor) for size in sizes]
    return model, [for_model(request, model) for request in requests]


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
