"""The end of the video model's training: the checkpoint is exported and measured on clips and pictures, its card is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..common.card import FRONT, USAGE, stage_times, table, this_machine
from ..common.dataset import load_rows
from ..common.evaluate import measure as measure_pictures
from ..common.pipeline import Pipeline
from ..common.workshop import Workshop
from .evaluate import MODES, measure_clips
from .questions import CLIP_TASKS

CLIPS, PICTURES = 120, 40
"""Test clips and pictures that the card's figures are of."""
QUESTIONS = {
    "motion": ("what moved?", "1/6"),
    "order": ("what came first? (or: last)", "1/6"),
    "counting": ("how many things appeared?", "1/4"),
    "reading": ("what does the text say?", "0"),
    "happened": ("did the circle move? (or: appear)", "1/2"),
}


def finish(pipeline: Pipeline, workshop: Workshop, limit: int | None = None) -> dict[str, Any]:
    """Export the last stage's weights to `{out}/{name}`, measure the exported files (the first `limit` items), write the card."""
    folder = workshop.out / pipeline.name
    workshop.load(list(pipeline.stages)[-1])
    workshop.export(folder)
    clips, pictures = min(limit or CLIPS, CLIPS), min(limit or PICTURES, PICTURES)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    figures = {
        "parameters": model.num_parameters(),
        "clips": clips,
        "pictures": pictures,
        "scenes": measure_pictures(model, processor, load_rows().select(range(pictures)), batch_size=16),
        "stages": stage_times(workshop.out, list(pipeline.stages)),
        **measure_clips(folder, clips),
    }
    (workshop.out / "figures.json").write_text(json.dumps(figures, indent=2))
    (folder / "README.md").write_text(write_card(pipeline, figures, folder))
    return figures


def write_card(pipeline: Pipeline, figures: dict[str, Any], folder: Path, machine: str | None = None) -> str:
    """The model card with the measured figures; `machine` is this one unless said otherwise."""
    names = {"name": pipeline.name, "model_class": pipeline.model_class}
    times = figures["stages"]
    rows = [
        f"| {task} | {QUESTIONS[task][0]} | {figures['items'][task]} | "
        f"{' | '.join(f'{100 * figures[mode][task]:.1f}' for mode in MODES)} | {QUESTIONS[task][1]} |"
        for task in CLIP_TASKS
    ]
    return pipeline.card.read_text().format(
        front=FRONT.format(**names),
        usage=USAGE.format(**names),
        command=f"python -m vlmprune.eval.training.train {pipeline.name}",
        machine=machine or this_machine(),
        parameters=figures["parameters"] / 1e6,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        clips=figures["clips"],
        pictures=figures["pictures"],
        picture_figures=", ".join(f"{name} {100 * share:.0f}" for name, share in figures["scenes"].items()),
        table=table(("task", "question", "items", "all tokens", "blind", "one frame", "10 % random", "guessing"), rows),
        stages=table(
            ("stage", "steps", "seconds"),
            [f"| {name} | {time['steps']} | {time['seconds']:.0f} |" for name, time in times.items()],
        ),
        minutes=sum(time["seconds"] for time in times.values()) / 60,
    )
