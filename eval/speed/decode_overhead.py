"""What a decode step costs under an applied method, against the unpatched model on a cache of the same length.

python -m vlmprune.eval.speed.decode_overhead --model tiny-llava --methods divprune,fastv --steps 400
python -m vlmprune.eval.speed.decode_overhead --random-weights llava-1b --methods divprune --steps 40
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import vlmprune
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.random_weights import open_preset
from vlmprune.eval.models.synthetic_request import for_model, parse_sizes, synthetic_request
from vlmprune.eval.run.cells import Cell, make_cells, parse_keeps, parse_methods, usable_cells
from vlmprune.eval.run.csv_lines import add_to_csv, this_run

from .rounds import spread, wait_for

WARM_UP = 5


@dataclass(frozen=True)
class DecodeOverhead:
    """One method. Times are milliseconds of one decode step (median and quartiles), one token a row.

    `unpatched` is the model without hooks on caches that hold exactly as much, layer by layer. `overhead` is the ratio of the
    medians; `paired` the median, and quartiles, of the ratios within pairs of neighbouring steps; `cpu` the ratio of the
    medians of the process's CPU times, which other work on the machine disturbs less. `added_us` and `cpu_added_us` are
    microseconds that a step takes longer, the median of the differences within pairs.
    """

    title: str
    keep: float | int | None
    cache_length: int
    caller_length: int
    steps: int
    pruned_ms: float
    pruned_ms_q25: float
    pruned_ms_q75: float
    unpatched_ms: float
    unpatched_ms_q25: float
    unpatched_ms_q75: float
    pruned_tokens_per_second: float
    unpatched_tokens_per_second: float
    overhead: float
    paired: float
    paired_q25: float
    paired_q75: float
    cpu: float
    added_us: float
    cpu_added_us: float


@torch.inference_mode()
def measure_decode(
    model: PreTrainedModel, inputs: dict[str, Tensor], cells: Sequence[Cell], steps: int
) -> list[DecodeOverhead]:
    """Time `steps` pairs of decode steps for every cell, the two of a pair in random order.

    A step is that of `generate` but for choosing the token: it prepares the inputs from the caller's mask and position and the
    cache, and runs the model.
    """
    return [_measure(model, inputs, cell, steps) for cell in cells if not cell.is_full]


def _measure(model: PreTrainedModel, inputs: dict[str, Tensor], cell: Cell, steps: int) -> DecodeOverhead:
    patched = with_shared_weights(model)
    with cell.applied_to(patched):
        pruned = patched(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        same = same_entries(pruned)
        held = max(layer.get_seq_length() for layer in pruned.layers)
        sides = [_Side(patched, pruned, len(inputs["input_ids"])), _Side(model, same, len(inputs["input_ids"]))]
        order = random.Random(0)
        for step in range(WARM_UP + steps):
            for side in order.sample(sides, 2):
                side.step(keep_times=step >= WARM_UP)
    (one, other), ratios = sides, [a / b for a, b in zip(sides[0].seconds, sides[1].seconds, strict=True)]
    pruned_ms, unpatched_ms, paired = spread(one.seconds), spread(other.seconds), spread(ratios, 1)
    return DecodeOverhead(
        title=cell.title,
        keep=cell.keep,
        cache_length=held,
        caller_length=inputs["input_ids"].shape[1],
        steps=steps,
        pruned_ms=pruned_ms["median"],
        pruned_ms_q25=pruned_ms["q25"],
        pruned_ms_q75=pruned_ms["q75"],
        unpatched_ms=unpatched_ms["median"],
        unpatched_ms_q25=unpatched_ms["q25"],
        unpatched_ms_q75=unpatched_ms["q75"],
        pruned_tokens_per_second=1e3 / pruned_ms["median"],
        unpatched_tokens_per_second=1e3 / unpatched_ms["median"],
        overhead=pruned_ms["median"] / unpatched_ms["median"],
        paired=paired["median"],
        paired_q25=paired["q25"],
        paired_q75=paired["q75"],
        cpu=statistics.median(one.cpu) / statistics.median(other.cpu),
        added_us=_added(one.seconds, other.seconds),
        cpu_added_us=_added(one.cpu, other.cpu),
    )


def _added(seconds: Sequence[float], others: Sequence[float]) -> float:
    return 1e6 * statistics.median(a - b for a, b in zip(seconds, others, strict=True))


class _Side:
    """A model and its cache; every step adds one token to it."""

    def __init__(self, model: PreTrainedModel, cache: Any, rows: int) -> None:
        self.model, self.cache, self.rows = model, cache, rows
        self.seconds: list[float] = []
        self.cpu: list[float] = []

    def step(self, keep_times: bool) -> None:
        past, device = int(self.cache.get_seq_length()), self.model.device
        arguments = {
            "input_ids": torch.full((self.rows, 1), 5, device=device),
            "next_sequence_length": 1,
            "past_key_values": self.cache,
            "attention_mask": torch.ones(self.rows, past + 1, dtype=torch.int64, device=device),
            "position_ids": torch.full((self.rows, 1), past, device=device),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        prepare: Any = self.model.prepare_inputs_for_generation
        wait_for(self.model.device)
        start, cpu = time.perf_counter(), time.process_time()
        self.model(**prepare(**arguments))
        wait_for(self.model.device)
        if keep_times:
            self.seconds.append(time.perf_counter() - start)
            self.cpu.append(time.process_time() - cpu)


def with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with modules of its own and the weights of `model`, so that one can be patched beside the other."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def same_entries(pruned: Any) -> DynamicCache:
    """Return an ordinary cache whose layers hold what those of `pruned` hold."""
    plain = DynamicCache()
    for number, layer in enumerate(pruned.layers):
        plain.update(layer.keys.clone(), layer.values.clone(), number)
    return plain


def write_decode_csv(path: Path, rows: Sequence[DecodeOverhead], about: dict[str, Any]) -> None:
    """Add one line a method, `about` in columns of its own."""
    run = this_run()
    described = {**about, "cpu_name": run.pop("cpu"), **run}
    lines = [
        {
            **{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(row).items()},
            **described,
        }
        for row in rows
    ]
    add_to_csv(path, lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line a method, and add it to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="shipped model, local folder or hub name")
    source.add_argument("--random-weights", help="preset whose architecture is built with random weights")
    parser.add_argument("--methods", default="divprune,fastv,pyramiddrop", help="by comma")
    parser.add_argument("--keep", default="0.5", help="budgets by comma")
    parser.add_argument("--steps", type=int, default=200, help="pairs of decode steps")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--image-size", default="336")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="CSV file to which the lines are added")
    options = parser.parse_args(arguments)
    (size,) = parse_sizes(options.image_size)
    if options.model is not None:
        loaded = load_model(options.model, options.dtype, options.device, options.batch_size)
        model, processor = loaded.model, getattr(loaded.processor, "image_processor", None)
    else:
        model, processor = open_preset(
            options.random_weights, options.dtype, options.device, options.batch_size, size, options.text_tokens
        )
    request = synthetic_request(model.config, size, options.text_tokens, options.batch_size, processor)
    inputs = for_model(request, model)
    methods = parse_methods(options.methods)
    cells, left_out = usable_cells(model, make_cells(methods, parse_keeps(options.keep), 0), methods)
    console = Console(width=100)
    for item in left_out:
        console.print(item.note, soft_wrap=True, markup=False)
    rows = measure_decode(model, inputs, cells, options.steps)
    for row in rows:
        console.print(
            f"{row.title:<16} keep {row.keep}: {row.cache_length} of {row.caller_length} entries, "
            f"{row.unpatched_ms:.3f} ms unpatched, {row.pruned_ms:.3f} ms pruned, {row.overhead:.3f}x "
            f"(pairs {row.paired:.3f}x, {row.paired_q25:.3f} to {row.paired_q75:.3f}; CPU time {row.cpu:.3f}x); "
            f"{row.added_us:.0f} us more a step, {row.cpu_added_us:.0f} us of CPU time",
            soft_wrap=True,
        )
    if options.out is not None and rows:
        name = options.model or options.random_weights
        about = {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "batch_size": options.batch_size,
            "vlmprune": vlmprune.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
        write_decode_csv(options.out, rows, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
