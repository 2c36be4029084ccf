"""Time of the vision tower under methods that reduce tokens inside it.

    python -m vlmprune.eval.speed.tower --methods tome --keep 0.5 --dtype float32,bfloat16 --seconds 60 --out tower.csv

A preset's tower and projector with random weights encode one picture, with and without each method, in rounds over all of them.
The language model is cut to one layer, and does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import vlmprune
from vlmprune.eval.flops import VisionWork, request_cost
from vlmprune.eval.models.random_weights import build_random, preset_config
from vlmprune.eval.run.cells import parse_keeps
from vlmprune.eval.run.csv_lines import add_to_csv, flattened, this_run
from vlmprune.eval.run.figures import keep_text
from vlmprune.eval.run.table_style import cost_style
from vlmprune.methods.encoder_method import EncoderMethod
from vlmprune.methods.registry import known_methods, make_method
from vlmprune.patches.families.registry import family_of_config

from .rounds import run_rounds, spread, worked
from .selection_command import with_short_language_model

# Patches along a side of the picture that a tower over pictures of any size is given: about 672 pixels.
SIDE = 48


@dataclass(frozen=True)
class TowerTime:
    """The tower under one method.

    Attributes:
        method: its name, "full" for the unpatched tower.
        keep: its budget.
        output: what it hands on.
        dtype: of the weights.
        gflops: of tower and projector, counted.
        time: milliseconds of encoding one picture, on a CPU those that its threads work: median and quartiles.
        speedup: how many times faster than the unpatched tower of the same round: median and quartiles.
        rounds: how many of them.
    """

    method: str
    keep: float | None
    output: str
    dtype: str
    gflops: float
    time: dict[str, float]
    speedup: dict[str, float]
    rounds: int


def tower_config(preset: str) -> PreTrainedConfig:
    """The configuration of a preset, with one layer in its language model."""
    return with_short_language_model(preset_config(preset))


def measure_towers(
    model: PreTrainedModel,
    methods: Sequence[EncoderMethod],
    dtype: str,
    seconds: float,
    most: int = 30,
    side: int = SIDE,
) -> list[TowerTime]:
    """Encode one picture with and without each method, in rounds; the model is as before afterwards.

    Args:
        model: the model.
        methods: what is compared with the unpatched tower.
        dtype: of the weights, by name.
        seconds: time for everything.
        most: the highest number of rounds.
        side: patches along a side of the picture, for towers that take any size.
    """
    inputs, work = _one_picture(model, side)
    inner: Any = model.model
    chosen: list[EncoderMethod | None] = [None, *methods]
    times: dict[int, list[float]] = {index: [] for index in range(len(chosen))}

    def visit(index: int, counts: bool) -> bool:
        method = chosen[index]
        applied: AbstractContextManager[Any] = nullcontext() if method is None else vlmprune.pruned(model, method)
        with applied:
            took = worked(lambda: inner.get_image_features(**inputs), model.device)
        if counts:
            times[index].append(took)
        return True

    with torch.inference_mode():
        run_rounds(range(len(chosen)), visit, seconds, most)
    visual = [1] * int(model.config.get_text_config().num_hidden_layers)
    found = []
    for index, method in enumerate(chosen):
        cost = request_cost(model.config, work, visual, 1, method=method)
        ratios = [full / own for full, own in zip(times[0], times[index], strict=True)]
        found.append(
            TowerTime(
                method="full" if method is None else method.name,
                keep=None if method is None else method.keep,
                output="" if method is None else method.output,
                dtype=dtype,
                gflops=2 * (cost.vision + cost.projector + (cost.selection or 0)) / 1e9,
                time=spread(times[index]),
                speedup=spread(ratios, 1),
                rounds=len(times[index]),
            )
        )
    return found


def _one_picture(model: Any, side: int) -> tuple[dict[str, Any], VisionWork]:
    """Arguments of `get_image_features` for a picture of noise: a tile, or `side` x `side` patches."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    vision = config.vision_config
    if family_of_config(config).tower_kind == "packed":
        values = (
            (getattr(vision, "in_channels", None) or vision.in_chans)
            * vision.temporal_patch_size
            * vision.patch_size**2
        )
        pixels, grid = torch.randn(side * side, values, generator=generator), (1, side, side)
        inputs = {"pixel_values": _placed(pixels, model), "image_grid_thw": torch.tensor([grid], device=model.device)}
        return inputs, VisionWork(grids=(grid,))
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    chosen = {name: getattr(config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    return {"pixel_values": _placed(pixels, model), **chosen}, VisionWork(crops=1)


def _placed(pixels: Tensor, model: Any) -> Tensor:
    return pixels.to(model.device, model.dtype)


def tower_table(rows: Sequence[TowerTime]) -> Table:
    """Milliseconds, their quartiles and how much faster."""
    table: Table = cost_style(
        f"vision tower, {rows[0].dtype}, medians of {rows[0].rounds} rounds, {torch.get_num_threads()} threads"
    )
    for name in ("method", "keep", "output", "GFLOPs", "ms", "quartiles", "faster", "quartiles"):
        table.add_column(name, justify="left" if name in ("method", "output") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.method,
            keep_text(row.keep),
            row.output,
            f"{row.gflops:.1f}",
            f"{row.time['median']:.0f}",
            f"{row.time['q25']:.0f} to {row.time['q75']:.0f}",
            f"{row.speedup['median']:.2f}x",
            f"{row.speedup['q25']:.2f} to {row.speedup['q75']:.2f}",
        )
    return table


def main(
    preset: Annotated[str, typer.Option(help="A true architecture with random weights.")] = "llava-1.5-7b",
    methods: Annotated[str, typer.Option(help="Methods by comma; all that act in the tower by default.")] = "all",
    keep: Annotated[str, typer.Option(help="Average shares of tokens, by comma.")] = "0.5",
    output: Annotated[str, typer.Option(help="full or merged.")] = "full",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, by comma.")] = "float32,bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0, help="Time to spend on each dtype.")] = 60.0,
    side: Annotated[
        int, typer.Option(min=2, help="Patches along a side of the picture, for towers of any size.")
    ] = SIDE,
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0 leaves them.")] = 0,
    out: Annotated[Path | None, typer.Option(help="CSV file to which the lines are added.")] = None,
) -> None:
    """Measure the vision tower with and without methods that reduce tokens inside it."""
    if threads:
        torch.set_num_threads(threads)
    acting = [name for name, cls in known_methods().items() if issubclass(cls, EncoderMethod)]
    names = acting if methods == "all" else methods.split(",")
    made = [make_method(name, budget, output=output) for budget in parse_keeps(keep) for name in names]
    chosen = [method for method in made if isinstance(method, EncoderMethod)]
    console = Console(width=110)
    for each in dtype.split(","):
        model = build_random(tower_config(preset), each, device)
        rows = measure_towers(model, chosen, each, seconds, side=side)
        console.print(tower_table(rows))
        if out is not None:
            about = {"model": preset, "device": model.device.type, **this_run()}
            add_to_csv(out, [{**flattened(asdict(row), 4, "_ms", ("speedup",)), **about} for row in rows])


if __name__ == "__main__":
    typer.run(main)
