"""Benchmarks spend their time in the model, not around it."""

from __future__ import annotations

import io
import json

import pytest

pytest.importorskip("lmms_eval")

from rich.console import Console

from vlmprune.eval.bench import BenchOptions, run_bench


def test_most_of_the_time_is_spent_inside_the_model(tmp_path):
    """Nine tenths of a full demo; the few items here leave more to what surrounds them."""
    options = BenchOptions(
        model="tiny-llava",
        methods=[("divprune", {})],
        keeps=[0.25],
        tasks=["scenes_existence", "scenes_attribute"],
        out=tmp_path / "out",
        limit=8,
        batch_size=8,
        device="cpu",
        baselines=False,
        timing_seconds=0,
    )
    run_bench(options, Console(file=io.StringIO()))
    seconds = [json.loads(file.read_text())["seconds"] for file in (tmp_path / "out" / "cells").iterdir()]
    assert len(seconds) == 2
    inside, whole = (sum(cell[part] for cell in seconds) for part in ("inside_the_model", "all"))
    assert 0.8 * whole < inside < whole
