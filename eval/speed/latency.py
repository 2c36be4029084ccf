"""Where the time of a request goes, and how far a pruned prefill is from the ideal one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import vlmprune
from vlmprune.errors import BudgetError
from vlmprune.eval.models.memory import PeakMemory
from vlmprune.eval.models.visual_tokens import visual_tokens
from vlmprune.eval.run.cells import Cell, LeftOut, not_reachable

from .cell_times import time_generation
from .ideal_prefill import IdealPrefill, encode_images
from .rounds import clocked, run_rounds, spread

MOST_ROUNDS = 30


@dataclass(frozen=True)
class Measurement:
    """One cell at one batch size and picture size. Times are milliseconds (median and quartiles).

    `prefill` is one forward, tower included; `ideal` the same work without the dropped tokens and without selecting them;
    `selection` their difference; `overhead` their ratio; `first_token` is the time of `generate` until the first token.
    `peak_bytes`: the highest use of memory during `generate` above that before it (the GPU's allocator, on a CPU the process).
    `video_frames`: of that size, 0 where the request holds a picture.
    """

    title: str
    keep: float | int | None
    batch_size: int
    image_size: tuple[int, int]
    visual_tokens_before: int
    visual_tokens_after: float
    text_tokens: int
    vision: dict[str, float]
    selection: dict[str, float]
    prefill: dict[str, float]
    ideal: dict[str, float]
    overhead: dict[str, float]
    first_token: dict[str, float]
    decode_per_token: dict[str, float]
    end_to_end: dict[str, float]
    kv_cache_bytes: int
    peak_bytes: int | None
    rounds: int
    video_frames: int = 0


def measure(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    image_size: tuple[int, int],
    cells: Sequence[Cell],
    new_tokens: int,
    seconds: float,
    on_progress: Callable[[int, int], None] | None = None,
    on_left_out: Callable[[LeftOut], None] | None = None,
) -> list[Measurement]:
    """Measure every cell on the same inputs, in rounds over all cells so that a drifting machine drifts for all of them.

    `ideal` is the unpatched model given as many tokens as the pruned one kept: vision tower and projector, then the language
    model on that many embeddings. It is timed next to the prefill of its cell, and `overhead` is the median of the ratios
    within rounds. For methods that drop inside the language model its sequence is cut short before the same layers. The first
    round warms up and sets how many follow within about `seconds` (3 to 30). A cell whose budget a picture of that size does
    not allow is left out, and `on_left_out` told.
    """
    probes = [_Probe(model, inputs, image_size, cell, new_tokens) for cell in cells]
    unreachable = []

    def visit(probe: _Probe, counts: bool) -> bool:
        try:
            probe.run(keep_times=counts)
        except BudgetError as error:
            unreachable.append(probe)
            if on_left_out is not None:
                on_left_out(not_reachable(probe.cell, error))
            return False
        return True

    with torch.inference_mode():
        run_rounds(probes, visit, seconds, MOST_ROUNDS, on_progress)
    return [probe.measurement() for probe in probes if probe not in unreachable]


class _Probe:
    """Times one cell; every `run` is one round."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        image_size: tuple[int, int],
        cell: Cell,
        new_tokens: int,
    ) -> None:
        self.model, self.inputs, self.cell, self.new_tokens = model, inputs, cell, new_tokens
        self.image_size = image_size
        self.visual = int(visual_tokens(model.config, inputs["input_ids"][0]).sum())
        self.text = inputs["input_ids"].shape[1] - self.visual
        self.times: dict[str, list[float]] = {
            name: []
            for name in ("vision", "selection", "prefill", "ideal", "first_token", "decode_per_token", "end_to_end")
        }
        self.ratios: list[float] = []
        self.layers: list[int] = []
        self.cache_bytes = 0
        self.peak: int | None = None

    def run(self, keep_times: bool) -> None:
        model, inputs = self.model, self.inputs
        peak = PeakMemory(model.device)
        with self.cell.applied_to(model):
            output = model(**inputs, use_cache=True, logits_to_keep=1)
            self.cache_bytes = cache_bytes(output.past_key_values)
            del output
            prefill = self._clock(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
            self.layers = self._visual_per_layer()
            peak.start()
            first, decode = time_generation(model, inputs, self.new_tokens)
            self.peak = peak.read()
        vision = self._clock(lambda: encode_images(model, inputs))
        ideal = self._clock(IdealPrefill.prepare(model, inputs, self.layers).run)
        if not keep_times:
            return
        self.times["vision"].append(vision)
        self.times["prefill"].append(prefill)
        self.times["first_token"].append(first)
        self.times["decode_per_token"].extend(decode)
        self.times["end_to_end"].append(first + sum(decode))
        self.times["ideal"].append(ideal)
        self.times["selection"].append(prefill - ideal)
        self.ratios.append(prefill / ideal)

    def _visual_per_layer(self) -> list[int]:
        """Visual tokens by layer, of the row with the most, to which the others are padded."""
        if self.cell.is_full:
            return [self.visual] * int(self.model.config.get_text_config().num_hidden_layers)
        rows = vlmprune.last_run(self.model).visual_tokens_per_layer
        return [max(counts) for counts in zip(*rows, strict=True)]

    def _clock(self, call: Callable[[], Any]) -> float:
        return clocked(call, self.model.device)

    def measurement(self) -> Measurement:
        return Measurement(
            title=self.cell.title,
            keep=self.cell.keep,
            batch_size=len(self.inputs["input_ids"]),
            image_size=self.image_size,
            visual_tokens_before=self.visual,
            visual_tokens_after=statistics.fmean(self.layers),
            text_tokens=self.text,
            overhead=spread(self.ratios, 1),
            kv_cache_bytes=self.cache_bytes,
            peak_bytes=self.peak,
            rounds=len(self.ratios),
            video_frames=0,
            **{name: spread(values) for name, values in self.times.items()},
        )


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
