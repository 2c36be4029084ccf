"""The end of a training run: the checkpoint is exported, its files are measured, and its model card is written.

A card's text is `card.md` beside each schedule; its fields in braces are what all cards have alike.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .evaluate import MODES, ORACLE_MODES, measure_folder
from .pipeline import Pipeline
from .questions import TASKS
from .workshop import Workshop

CHANCE = {"attribute": "1/8", "existence": "1/2", "counting": "about 1/3", "relation": "1/2", "reading": "0"}
QUESTIONS = {
    "attribute": "what colour is the circle?",
    "existence": "is there a red circle?",
    "counting": "how many circles?",
    "relation": "is the red circle left of the blue square? (or: above)",
    "reading": "what does the text say?",
}
FRONT = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
---
# {name}"""
USAGE = """\
```python
from transformers import AutoProcessor, {model_class}
model = {model_class}.from_pretrained("eval/checkpoints/{name}")
processor = AutoProcessor.from_pretrained("eval/checkpoints/{name}")
```"""
PURPOSE = """\
A model for tests and for comparing pruning methods cheaply; its figures say nothing about large models. It does not
understand free questions, only the five forms in"""


def finish(
    pipeline: Pipeline, workshop: Workshop, limit: int | None = None, weights: Path | None = None
) -> dict[str, Any]:
    """Export the last stage's weights to `{out}/{name}`, measure the exported files (the first `limit` items), write the card.

    With `weights` only the stages in `pipeline.further` were run.
    """
    if pipeline.finish is not None:
        return pipeline.finish(pipeline, workshop, limit)
    if pipeline.foreground is None:
        raise ValueError(f"{pipeline.name}'s pipeline does not tell what the foreground is")
    folder = workshop.out / pipeline.name
    workshop.load(list(pipeline.stages)[-1])
    workshop.export(folder)
    figures = measure_folder(folder, pipeline.large, pipeline.foreground, limit)
    figures["stages"] = stage_times(workshop.out, pipeline.further if weights else list(pipeline.stages))
    (workshop.out / "figures.json").write_text(json.dumps(figures, indent=2))
    (folder / "README.md").write_text(write_card(pipeline, figures, folder, weights=weights))
    return figures


def stage_times(out: Path, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Steps and seconds of every stage of a run."""
    times = {}
    for stage in stages:
        state = torch.load(out / f"{stage}.pt", weights_only=True)
        times[stage] = {"steps": state["step"], "seconds": round(state["seconds"])}
    return times


def write_card(
    pipeline: Pipeline, figures: dict[str, Any], folder: Path, machine: str | None = None, weights: Path | None = None
) -> str:
    """The model card with the measured figures; `machine` is this one unless said otherwise.

    With `weights` only the stages in `pipeline.further` were run.
    """
    names = {"name": pipeline.name, "model_class": pipeline.model_class}
    times = figures["stages"]
    stages = [f"| {name} | {time['steps']} | {time['seconds']:.0f} |" for name, time in times.items()]
    rows = [accuracy_row(figures, task) for task in TASKS]
    if pipeline.large:
        rows.append(accuracy_row(figures, "reading", "reading, large", "large_"))
    modes = ("full", *ORACLE_MODES)
    oracle_rows = [f"| {task} | {' | '.join(f'{100 * figures[mode][task]:.1f}' for mode in modes)} |" for task in TASKS]
    return pipeline.card.read_text().format(
        front=FRONT.format(**names),
        usage=USAGE.format(**names),
        purpose=PURPOSE,
        command=f"python -m vlmprune.eval.training.train {pipeline.name}"
        + (" --weights CHECKPOINT" if weights else ""),
        machine=machine or this_machine(),
        parameters=figures["parameters"] / 1e6,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        items=figures["items"],
        large_items=figures.get("large_items"),
        table=table(("task", "question", "all tokens", "blind", "5 % random", "guessing"), rows),
        oracle=table(("task", "all tokens", "foreground", "as many, random"), oracle_rows),
        foreground_tokens=figures["foreground_tokens"],
        visual_tokens=figures["visual_tokens"],
        stages=table(("stage", "steps", "seconds"), stages),
        minutes=sum(time["seconds"] for time in times.values()) / 60,
        limits=_limits(figures),
    )


def accuracy_row(figures: dict[str, Any], task: str, name: str = "", prefix: str = "") -> str:
    """A task's row of the accuracy table, from the figures whose modes' names begin with `prefix`."""
    shares = " | ".join(f"{100 * figures[prefix + mode][task]:.1f}" for mode in MODES)
    return f"| {name or task} | {QUESTIONS[task]} | {shares} | {CHANCE[task]} |"


def this_machine() -> str:
    """The machine that a card names where it is told no other."""
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, no GPU"


def table(names: Sequence[str], rows: Sequence[str]) -> str:
    """A table with these columns; `rows` are its lines."""
    return "\n".join([f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *rows])


def _limits(figures: dict[str, Any]) -> str:
    """Which tasks it has not learned: less than five points above blind."""
    weak = [task for task in TASKS if figures["full"][task] < figures["blind"][task] + 0.05]
    return f" It has **not** learned: {', '.join(weak)} (no better than blind)." if weak else ""
