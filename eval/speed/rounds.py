"""One clock, and rounds in which everything that is compared is visited, so that a drifting machine drifts for all of it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
LEAST_ROUNDS = 3
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks by name: of the wall, or of the processor time of all threads, on a machine that does other work."""


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call, what it gives the device to do included."""
    wait_for(device)
    start = clock()
    call()
    wait_for(device)
    return clock() - start


def worked(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call keeps a CPU's threads at work, whatever else the machine does; on other devices as `clocked`."""
    return clocked(call, device, CLOCKS["cpu" if device.type == "cpu" else "wall"])


def spread(values: Sequence[float], factor: float = 1e3) -> dict[str, float]:
    """Median and quartiles times a factor: of seconds in milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": factor * middle, "q25": factor * low, "q75": factor * high}


def run_rounds(
    items: Sequence[T],
    visit: Callable[[T, bool], bool],
    seconds: float,
    most: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Visit all items in every round, each time in another order.

    The first round warms up and sets how many follow within about `seconds`.

    Args:
        items: what is compared.
        visit: takes an item and whether its times count, which those of the first round do not; says whether the item stays in.
        seconds: time for everything.
        most: the highest number of rounds that count; the lowest is 3.
        on_progress: is told the rounds done and planned after each.
    """
    turns, order = list(items), random.Random(0)
    rounds, done = 1 + LEAST_ROUNDS, 0
    start = time.perf_counter()
    while done < rounds:
        order.shuffle(turns)
        turns = [item for item in turns if visit(item, done > 0)]
        if not done:
            rounds = 1 + max(LEAST_ROUNDS, min(most, int(seconds / (time.perf_counter() - start)) - 1))
        done += 1
        if on_progress is not None:
            on_progress(done, rounds)
