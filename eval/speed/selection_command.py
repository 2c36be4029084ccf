"""The selection-cost command: a preset with random weights, every cell on every request, tables and a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vlmprune.budget import Keep
from vlmprune.eval.models.loading import pick_device
from vlmprune.eval.models.memory import require_memory
from vlmprune.eval.models.random_text_tower import random_text_tower
from vlmprune.eval.models.random_weights import build_random, preset_config, preset_image_processor, random_dtype
from vlmprune.eval.models.synthetic_request import for_model, parse_sizes, synthetic_request
from vlmprune.eval.run.cells import Cell, LeftOut, make_cells, usable_cells
from vlmprune.eval.run.csv_lines import add_to_csv, flattened, this_run
from vlmprune.eval.run.figures import keep_text, median_text, three_figures, with_quartiles
from vlmprune.eval.run.table_style import cost_style
from vlmprune.eval.run.text_towers import equipped

from .selection_cost import TOWER_ALONE, SelectionCost, measure_selection, sites_of

TOWER_LAYERS = 2


def with_short_tower(config: PreTrainedConfig, layers: int = TOWER_LAYERS, packed: bool = False) -> PreTrainedConfig:
    """`config` with that many layers in its tower: they run alike with and without pruning, and cost time here.

    A CLIP or SigLIP tower; with `packed` that of Qwen2-VL and Qwen2.5-VL too, the last layer with full attention.
    """
    vision = config.vision_config
    if hasattr(vision, "num_hidden_layers"):
        vision.num_hidden_layers = min(vision.num_hidden_layers, layers)
    elif packed and not getattr(vision, "deepstack_visual_indexes", None):
        vision.depth = min(vision.depth, layers)
        if getattr(vision, "fullatt_block_indexes", None):
            vision.fullatt_block_indexes = [vision.depth - 1]
    return config


def with_short_language_model(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` with one decoder layer: what methods do in the tower does not depend on them."""
    return with_short_language(config, 1)[0]


def with_short_language(config: PreTrainedConfig, layers: int) -> tuple[PreTrainedConfig, float]:
    """`config` with that many layers in its language model (0: all), and how many true ones each of them stands for."""
    text = config.get_text_config()
    whole = int(text.num_hidden_layers)
    if not 0 < layers < whole:
        return config, 1.0
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config, whole / layers


def write_selection_csv(path: Path, rows: Sequence[SelectionCost], about: dict[str, Any]) -> None:
    """One line a method and request, medians and quartiles, `about` in columns of its own."""
    described = {**about, **this_run()}
    ratios = ("share", "overhead")
    add_to_csv(path, [{**flattened(asdict(row), 4, "_ms", ratios), **described} for row in rows])


def selection_table(rows: Sequence[SelectionCost]) -> Table:
    """Milliseconds, and the share in percent with its quartiles, of rows that were measured in the same place."""
    first = rows[0]
    whole = "full prefill" if first.where == "language model" else "vision tower"
    table = cost_style(
        f"{first.visual_tokens_before} visual and {first.text_tokens} text tokens, {whole} "
        f"{median_text(first.full)} ms; {first.clock} ms, medians (quartiles) of {first.rounds} rounds"
    )
    table.add_column("method", no_wrap=True, max_width=20)
    for name in ("keep", "tokens", "select", "prefill", "saved", "share %", "quartiles", "over"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for row in rows:
        table.add_row(
            row.title,
            keep_text(row.keep),
            f"{row.visual_tokens_after:.0f}",
            *(with_quartiles(part).replace(" ", "\n", 1) for part in (row.selection, row.pruned, row.saved)),
            *(("none", "none") if saves_nothing(row) else _share_text(row)),
            f"{row.overhead['median']:.3f}x",
        )
    return table


def _share_text(row: SelectionCost) -> tuple[str, str]:
    low, middle, high = (100 * row.share[name] for name in ("q25", "median", "q75"))
    return f"{middle:.2f}", f"{low:.2f} to {high:.2f}"


def saves_nothing(row: SelectionCost) -> bool:
    """Whether a method keeps all tokens in all layers, so that there is nothing its cost could be a share of."""
    return row.where == "language model" and row.visual_tokens_after == row.visual_tokens_before


def added_line(rows: Sequence[SelectionCost]) -> str:
    """What methods that drop nothing add, in per cent of the full prefill."""
    added = [f"{row.title} {100 * row.selection['median'] / row.full['median']:.2f} %" for row in rows]
    return f"Drops nothing, and adds to the full prefill (later steps are not measured): {', '.join(added)}."


def memory_line(rows: Sequence[SelectionCost]) -> str:
    """The memory that each selection takes for itself, in MiB."""
    known = [
        f"{row.title} {three_figures(row.selection_peak_bytes / 2**20)}"
        for row in rows
        if row.selection_peak_bytes is not None
    ]
    return f"Memory taken by selecting, MiB: {', '.join(known) or 'not known'}."


def open_request(
    name: str,
    dtype: str,
    device: str,
    image_sizes: str,
    text_tokens: int,
    video_frames: int = 0,
    language_layers: int = 0,
) -> tuple[PreTrainedModel, list[dict[str, Tensor]], float]:
    """A preset with random weights and a short tower, and a request for each picture size of `"336,640x480"`.

    Args:
        name: the preset.
        dtype: "auto" is bfloat16.
        device: "auto" takes a GPU where there is one.
        image_sizes: sizes of the picture, or of the frames of a video.
        text_tokens: tokens that are not visual ones.
        video_frames: frames of a video in the picture's place.
        language_layers: layers of the language model that run (0: all).

    Returns:
        The model, the requests, and how many true layers each layer of the language model stands for.

    Raises:
        UnknownNameError: there is no preset of that name.
        ParameterError: the sizes are none.
        UnsupportedCallError: the model takes no videos.
        DeviceError: the model does not fit.
    """
    sizes = parse_sizes(image_sizes)
    short = with_short_tower(preset_config(name), packed=video_frames > 0)
    (config, depth), target = with_short_language(short, language_layers), pick_device(device)
    largest = max(sizes, key=prod)
    require_memory(name, config, random_dtype(dtype), target, 1, largest, text_tokens, video_frames=video_frames)
    model = build_random(config, dtype, device)
    processor = preset_image_processor(name)
    requests = [synthetic_request(config, size, text_tokens, 1, processor, video_frames=video_frames) for size in sizes]
    return model, [for_model(request, model) for request in requests], depth


def prepare_cells(
    model: PreTrainedModel,
    name: str,
    wanted: Sequence[tuple[str, dict[str, Any]]],
    keeps: Sequence[Keep],
    modality: Literal["image", "video"] = "image",
) -> tuple[list[Cell], list[LeftOut], PreTrainedModel]:
    """The cells that can be measured, those that cannot, and the model for methods that act in the tower alone.

    That one has the preset's whole tower and one decoder layer, and is `model` where no method needs it. Methods that score
    by a text tower get one with random weights.
    """
    tower = random_text_tower(model.config, model.dtype, model.device)
    pair = (None, None) if tower is None else (tower, tower[1])
    cells = equipped(make_cells(wanted, keeps, 0), *pair)
    inside = [cell for cell in cells if cell.is_pruned and sites_of(cell) == TOWER_ALONE]
    usable, left_out = usable_cells(model, [cell for cell in cells if cell not in inside], wanted, modality)
    if not inside:
        return usable, left_out, model
    dtype = str(model.dtype).removeprefix("torch.")
    deep = build_random(with_short_language_model(preset_config(name)), dtype, str(model.device))
    in_tower, not_in_tower = usable_cells(deep, inside, wanted, modality)
    return [*usable, *in_tower], [*left_out, *not_in_tower], deep


def run_selection_cost(
    model: PreTrainedModel,
    requests: Sequence[dict[str, Tensor]],
    cells: Sequence[Cell],
    rounds: int,
    out: Path | None,
    name: str,
    console: Console | None = None,
    tower_model: PreTrainedModel | None = None,
    clock: str = "wall",
    depth: float = 1.0,
) -> list[SelectionCost]:
    """Measure all cells on every request, print tables for each, and add their lines to the CSV file `out`.

    `tower_model`, `clock` and `depth` are those of `measure_selection`.
    """
    output = console or Console(width=100)
    found: list[SelectionCost] = []
    about = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    for inputs in requests:
        part = measure_selection(
            model,
            inputs,
            cells,
            rounds,
            lambda item: output.print(item.note, soft_wrap=True, markup=False),
            tower_model,
            clock,
            depth,
        )
        found.extend(part)
        for where in sorted({row.where for row in part}):
            output.print(selection_table([row for row in part if row.where == where]))
            output.print()
        dropping_nothing = [row for row in part if saves_nothing(row)]
        if dropping_nothing:
            output.print(added_line(dropping_nothing), soft_wrap=True, markup=False, highlight=False)
        if any(row.selection_peak_bytes is not None for row in part):
            output.print(memory_line(part), soft_wrap=True, markup=False, highlight=False)
        if part and out is not None:
            write_selection_csv(out, part, about)
    return found
