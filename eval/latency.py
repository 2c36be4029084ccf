"""Where the time of a request goes, and how far a pruned prefill is from the ideal one."""

from __future__ import annotations

import csv
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import vlmprune
from vlmprune.errors import unknown

from .cells import Cell
from .machine import describe_machine
from .progress import progress_bar
from .result_folder import ResultFolder, write_json
from .tables import cost_style, three_figures
from .timing import spread, time_generation

LEAST_ROUNDS, MOST_ROUNDS = 3, 30
IMAGE_MODELS = ("llava",)
"""Model types for which a request can be made up without a processor."""


@dataclass(frozen=True)
class Measurement:
    """One cell at one batch size. Times are milliseconds (median and quartiles); ``overhead`` is prefill over ideal."""

    title: str
    keep: float | int | None
    batch_size: int
    visual_tokens_before: int
    visual_tokens_after: float
    text_tokens: int
    vision: dict[str, float]
    prefill: dict[str, float]
    ideal: dict[str, float]
    overhead: dict[str, float]
    first_token: dict[str, float]
    decode_per_token: dict[str, float]
    end_to_end: dict[str, float]
    kv_cache_bytes: int
    peak_bytes: int | None
    rounds: int


def made_up_request(model: PreTrainedModel, batch_size: int, text_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``batch_size`` rows of one random picture and ``text_tokens`` random text tokens each.

    Raises ``UnknownNameError`` for a model type whose layout of placeholders is not known here.
    """
    config = model.config
    if config.model_type not in IMAGE_MODELS:
        raise unknown("model type", config.model_type, IMAGE_MODELS)
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    has_cls = vision.model_type.startswith("clip")
    visual = patches + has_cls - (config.vision_feature_select_strategy == "default")
    generator = torch.Generator().manual_seed(seed)
    low = min(10, config.get_text_config().vocab_size // 2)
    high = min(config.image_token_id, config.get_text_config().vocab_size)
    low = 0 if high <= low else low
    text = torch.randint(low, high, (batch_size, text_tokens), generator=generator)
    image = torch.full((batch_size, visual), config.image_token_id)
    ids = torch.cat([text[:, : text_tokens // 2], image, text[:, text_tokens // 2 :]], 1)
    shape = (batch_size, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.rand(shape, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def measure(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    cells: Sequence[Cell],
    new_tokens: int,
    seconds: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Measure every cell on the same inputs, in rounds over all cells so that a drifting machine drifts for all of them.

    ``ideal`` is the unpatched model given as many tokens as the pruned one kept: vision tower and projector, then the language
    model on that many embeddings. It is timed next to the prefill of its cell, and ``overhead`` is the median of the ratios
    within rounds. For methods that drop
    inside the language model its sequence is cut short before the same layers.
    """
    probes = [_Probe(model, inputs, cell, new_tokens) for cell in cells]
    turns, order = list(probes), random.Random(0)
    rounds, done = 1 + LEAST_ROUNDS, 0
    start = time.perf_counter()
    with torch.inference_mode():
        while done < rounds:
            order.shuffle(turns)
            for probe in turns:
                probe.run(keep_times=done > 0)
            if not done:
                rounds = 1 + max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / (time.perf_counter() - start)) - 1))
            done += 1
            if on_progress is not None:
                on_progress(done, rounds)
    return [probe.measurement() for probe in probes]


class _Probe:
    """Times one cell; every ``run`` is one round."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor], cell: Cell, new_tokens: int) -> None:
        self.model, self.inputs, self.cell, self.new_tokens = model, inputs, cell, new_tokens
        self.times: dict[str, list[float]] = {
            name: []
            for name in ("vision", "prefill", "ideal", "overhead", "first_token", "decode_per_token", "end_to_end")
        }
        self.layers: list[int] = []
        self.cache_bytes = 0
        self.peak: int | None = None

    def run(self, keep_times: bool) -> None:
        model, inputs, cell = self.model, self.inputs, self.cell
        visual = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
        text = inputs["input_ids"].shape[1] - visual
        with cell.applied_to(model):
            output = model(**inputs, use_cache=True, logits_to_keep=1)
            self.cache_bytes = cache_bytes(output.past_key_values)
            del output
            prefill = self._clock(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
            depth = model.config.get_text_config().num_hidden_layers
            self.layers = [visual] * depth if cell.is_full else vlmprune.last_run(model).visual_tokens_per_layer[0]
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            first, decode = time_generation(model, inputs, self.new_tokens)
            if model.device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated(model.device)
        pixels = inputs["pixel_values"]
        vision = self._clock(lambda: model.model.get_image_features(pixel_values=pixels))
        lengths = [count + text for count in self.layers]
        embeddings = model.get_input_embeddings()(inputs["input_ids"][:, : lengths[0]])
        ideal = self._clock(lambda: ideal_prefill(model, pixels, embeddings, lengths))
        if not keep_times:
            return
        self.times["vision"].append(vision)
        self.times["prefill"].append(prefill)
        self.times["first_token"].append(first)
        self.times["decode_per_token"].extend(decode)
        self.times["end_to_end"].append(first + sum(decode))
        self.times["ideal"].append(ideal)
        self.times["overhead"].append(prefill / ideal)

    def _clock(self, call: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def measurement(self) -> Measurement:
        ids = self.inputs["input_ids"]
        visual = int((ids[0] == self.model.config.image_token_id).sum())
        spreads = {name: spread(values) for name, values in self.times.items() if name != "overhead"}
        ratios = self.times["overhead"]
        return Measurement(
            title=self.cell.title,
            keep=self.cell.keep,
            batch_size=len(ids),
            visual_tokens_before=visual,
            visual_tokens_after=statistics.fmean(self.layers),
            text_tokens=ids.shape[1] - visual,
            overhead={key: value / 1e3 for key, value in spread(ratios).items()},
            kv_cache_bytes=self.cache_bytes,
            peak_bytes=self.peak,
            rounds=len(self.times["prefill"]),
            **spreads,
        )


def ideal_prefill(model: PreTrainedModel, pixels: Tensor, embeddings: Tensor, lengths: Sequence[int]) -> Tensor:
    """Tower, projector, and the language model as if the dropped tokens had never existed; last-token logits.

    ``embeddings`` [batch, tokens, dim] enter; before each layer the sequence is cut to its length in ``lengths`` [layers].
    """
    model.model.get_image_features(pixel_values=pixels)
    language = model.model.language_model
    if len(set(lengths)) == 1:
        hidden = language(inputs_embeds=embeddings[:, : lengths[0]], use_cache=True).last_hidden_state
    else:
        hidden = _staged(language, embeddings, lengths)
    logits: Tensor = model.lm_head(hidden[:, -1:])
    return logits


def _staged(language: PreTrainedModel, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    cache = DynamicCache(config=language.config)
    positions = rotary = None
    for layer, length in zip(language.layers, lengths, strict=True):
        if positions is None or length != hidden.shape[1]:
            hidden = hidden[:, :length]
            positions = torch.arange(length, device=hidden.device)[None]
            rotary = language.rotary_emb(hidden, positions)
        hidden = layer(
            hidden, position_ids=positions, past_key_values=cache, position_embeddings=rotary, use_cache=True
        )
    normed: Tensor = language.norm(hidden)
    return normed


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class LatencyOptions:
    """What ``run_latency`` measures; ``seconds`` is the time for each batch size."""

    cells: Sequence[Cell]
    batch_sizes: Sequence[int]
    text_tokens: int
    new_tokens: int
    seconds: float
    out: Path | None


def run_latency(
    model: PreTrainedModel, name: str, options: LatencyOptions, console: Console | None = None
) -> list[Measurement]:
    """Measure every cell at every batch size, print a table for each, and write latency.json and latency.csv."""
    console = console or Console(stderr=True)
    configuration = {
        "kind": "latency",
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "text_tokens": options.text_tokens,
        "new_tokens": options.new_tokens,
        "batch_sizes": list(options.batch_sizes),
    }
    folder = ResultFolder(options.out, configuration) if options.out is not None else None
    output = Console(width=100)
    found: list[Measurement] = []
    for batch_size in options.batch_sizes:
        inputs = made_up_request(model, batch_size, options.text_tokens)
        with progress_bar(console) as progress:
            bar = progress.add_task(f"batch size {batch_size}, rounds over {len(options.cells)} cells", total=None)
            part = measure(
                model,
                inputs,
                options.cells,
                options.new_tokens,
                options.seconds,
                lambda done, rounds, progress=progress, bar=bar: progress.update(bar, completed=done, total=rounds),  # type: ignore[misc]
            )
        found.extend(part)
        output.print(latency_table(part))
        output.print()
    if folder is not None:
        write_json(
            folder.path / "latency.json",
            {"machine": describe_machine(), **configuration, "rows": [asdict(m) for m in found]},
        )
        write_csv(folder.path / "latency.csv", found)
        output.print(f"Written to {folder.path}", soft_wrap=True)
    return found


def write_csv(path: Path, rows: Sequence[Measurement]) -> None:
    """One line a measurement, medians and quartiles."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {}
        for key, value in asdict(row).items():
            if isinstance(value, dict):
                line.update({f"{key}_{part}": f"{number:.6g}" for part, number in value.items()})
            else:
                line[key] = value
        lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def latency_table(rows: Sequence[Measurement]) -> Table:
    """Medians in milliseconds."""
    first = rows[0]
    table = cost_style(
        f"Batch size {first.batch_size}, {first.text_tokens} text tokens, milliseconds (medians of {first.rounds} rounds)"
    )
    table.add_column("method", no_wrap=True, max_width=18)
    for name in ("keep", "tokens", "vision", "prefill", "ideal", "over", "TTFT", "/token", "all", "KV MiB", "peak GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row.title,
            "-" if row.keep is None else f"{row.keep:g}",
            f"{row.visual_tokens_after:.0f}",
            *(_median(part) for part in (row.vision, row.prefill, row.ideal)),
            f"{row.overhead['median']:.2f}x",
            *(_median(part) for part in (row.first_token, row.decode_per_token, row.end_to_end)),
            three_figures(row.kv_cache_bytes / 2**20),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
            end_section=following is None or following.title != row.title,
        )
    return table


def _median(part: dict[str, float]) -> str:
    return three_figures(part["median"])
