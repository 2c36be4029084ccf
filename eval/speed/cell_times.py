"""Measured time to the first token and per further token, cell beside cell in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from vlmprune.eval.run.cells import Cell

from .rounds import run_rounds, spread

NEW_TOKENS = 9
MOST_ROUNDS = 15


class _Clock(BaseStreamer):
    """Notes the time of every token; the first `put` is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def time_generation(
    model: PreTrainedModel, inputs: dict[str, Any], new_tokens: int = NEW_TOKENS
) -> tuple[float, list[float]]:
    """Seconds from the call of `generate` to the first token, and from each token to the next.

    Greedy, `new_tokens` tokens exactly. A token counts when it has reached the host, which waits for the device.
    """
    clock = _Clock()
    start = time.perf_counter()
    model.generate(
        **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, streamer=clock, pad_token_id=0
    )
    tokens = clock.times[1:]
    return tokens[0] - start, [later - earlier for earlier, later in pairwise(tokens)]


@torch.inference_mode()
def time_cells(
    model: PreTrainedModel,
    inputs_of: Callable[[Cell], dict[str, Any]],
    cells: Sequence[Cell],
    seconds: float = 20.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Medians and quartiles in milliseconds by cell label, from rounds over all cells.

    Every round visits every cell, in an order of its own, so that a machine that slows down or speeds up does so for
    all of them. The first round warms up and sets how many follow within about `seconds` (3 to 15). After a method
    is put on, one untimed pass goes first. `inputs_of` gives what a cell is asked. `on_progress` gets (rounds
    done, rounds planned).
    """
    inputs = {cell.label: inputs_of(cell) for cell in cells}
    prefills: dict[str, list[float]] = {cell.label: [] for cell in cells}
    decodes: dict[str, list[float]] = {cell.label: [] for cell in cells}

    def visit(cell: Cell, counts: bool) -> bool:
        with cell.applied_to(model):
            time_generation(model, inputs[cell.label], 1)
            prefill, decode = time_generation(model, inputs[cell.label])
        if counts:
            prefills[cell.label].append(prefill)
            decodes[cell.label].extend(decode)
        return True

    run_rounds(cells, visit, seconds, MOST_ROUNDS, on_progress)
    return {
        cell.label: {
            "prefill_ms": spread(prefills[cell.label]),
            "decode_ms_per_token": spread(decodes[cell.label]),
            "rounds": len(prefills[cell.label]),
        }
        for cell in cells
    }
