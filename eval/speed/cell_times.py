"""Measured time to the first token and per further token, cell beside cell in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
    requests_of: Callable[[Cell], Sequence[Mapping[str, Any]]],
    cells: Sequence[Cell],
    seconds: float = 20.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Medians and quartiles in milliseconds by cell label, from rounds over all cells.

    Every round visits every cell with one of the requests, in an order of its own, so that a machine that slows down or speeds up
    does so for all of them; the requests take turns. The first round warms up and sets how many follow within about
    `seconds` (3 to 15, or as many as there are requests). After a method is put on, one untimed pass goes first.

    Args:
        model: the model, without a method.
        requests_of: gives inputs of `generate` for a cell, as many for each, all of one batch size.
        cells: what is timed; the unpruned one gives the others their `speed_up`, within rounds.
        seconds: time for everything.
        on_progress: gets (rounds done, rounds planned).
    """
    prefills: dict[str, list[float]] = {cell.label: [] for cell in cells}
    decodes: dict[str, list[float]] = {cell.label: [] for cell in cells}

    def visit(cell: Cell, counts: bool) -> bool:
        requests = requests_of(cell)
        inputs = dict(requests[len(prefills[cell.label]) % len(requests)])
        with cell.applied_to(model):
            time_generation(model, inputs, 1)
            prefill, decode = time_generation(model, inputs)
        if counts:
            prefills[cell.label].append(prefill)
            decodes[cell.label].extend(decode)
        return True

    count = len(requests_of(cells[0]))
    run_rounds(cells, visit, seconds, max(MOST_ROUNDS, count), on_progress)
    full = next((prefills[cell.label] for cell in cells if cell.is_full), None)
    return {
        cell.label: {
            "prefill_ms": spread(prefills[cell.label]),
            "decode_ms_per_token": spread(decodes[cell.label]),
            **({"speed_up": _speed_up(full, prefills[cell.label])} if full else {}),
            "rounds": len(prefills[cell.label]),
            "requests": min(count, len(prefills[cell.label])),
        }
        for cell in cells
    }


def _speed_up(full: Sequence[float], pruned: Sequence[float]) -> dict[str, float]:
    return spread([slow / fast for slow, fast in zip(full, pruned, strict=True)], 1)
