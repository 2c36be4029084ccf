"""Median times of contenders that take turns, and how fast this machine copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def medians_ms(runs: Sequence[Callable[[], object]], device: str, seconds: float) -> list[tuple[float, int]]:
    """Median time in ms and number of runs of each callable, taken in turns so that a busy machine slows all alike.

    About `seconds` for each, at least three runs, after a warm-up.
    """
    counts = []
    for run in runs:
        run()
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        counts.append(max(3, min(200, int(seconds / max(1e-6, time.perf_counter() - begin)))))
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(max(counts)):
        for i, run in enumerate(runs):
            if turn < counts[i]:
                times[i].append(_time_ms(run, device))
    return [(statistics.median(some), len(some)) for some in times]


def _time_ms(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes read and written a second by a copy too large for any cache."""
    source = torch.zeros(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (medians_ms([lambda: target.copy_(source)], device, seconds)[0][0] * 1e-3)
