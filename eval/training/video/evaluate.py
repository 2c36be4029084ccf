"""Accuracy of a tiny model on the clips: with all visual tokens, blind, with one frame only, and with a few random tokens.

`python -m vlmprune.eval.training.video.evaluate CHECKPOINT [--limit N]`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

import vlmprune
from vlmprune.eval.accuracy.videos import Video, processor_arguments

from ..common.dataset import load_rows
from ..common.evaluate import same
from .clips import FRAMES
from .dataset import CLIP_FILE
from .model import FPS
from .questions import CLIP_TASKS

MODES = ("full", "blind", "single", "random")
GREY = 128


def prompt(processor: ProcessorMixin, question: str) -> str:
    """The question with its clip in the model's chat format."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def shown(row: dict[str, Any], mode: str) -> Video:
    """A test clip as a mode shows it: `single` is the frame in the middle alone, as often as one moment has frames."""
    pictures = [np.asarray(picture.convert("RGB")) for picture in row["frames"]]
    order = row["order"]
    if mode == "single":
        order = FRAMES * [order[len(order) // 2]]
    frames = np.stack([pictures[number] for number in order])
    return Video(np.full_like(frames, GREY) if mode == "blind" else frames, FPS)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    mode: str = "full",
    keep: float = 0.1,
    batch_size: int = 16,
    tasks: Sequence[str] = tuple(CLIP_TASKS),
) -> dict[str, float]:
    """Share of right answers of each of the `tasks`, over the rows that have a question for it.

    `blind` replaces every frame by uniform grey, `single` the clip by its middle frame; `random` keeps a random share `keep` of
    each clip's visual tokens (one draw).
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, not one of {', '.join(MODES)}")
    found: dict[str, float] = {}
    with vlmprune.pruned(model, "random", keep=keep, seed=0) if mode == "random" else nullcontext():
        for task in tasks:
            numbers = [number for number, question in enumerate(rows[f"{task}_question"]) if question]
            hits = 0
            for begin in range(0, len(numbers), batch_size):
                part = [rows[number] for number in numbers[begin : begin + batch_size]]
                inputs = processor(
                    text=[prompt(processor, row[f"{task}_question"]) for row in part],
                    padding=True,
                    return_tensors="pt",
                    **processor_arguments([shown(row, mode) for row in part]),
                ).to(model.device)
                inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
                output = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
                answers = processor.batch_decode(output, skip_special_tokens=True)
                hits += sum(map(same, answers, [row[f"{task}_answer"] for row in part]))
            found[task] = hits / max(1, len(numbers))
    return found


def measure_clips(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Accuracy of a checkpoint folder in all modes on the first `limit` test clips, and the items of each task."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rows = load_rows(CLIP_FILE)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    items = {task: sum(map(bool, rows[f"{task}_question"])) for task in CLIP_TASKS}
    return {"items": items, **{mode: measure(model, processor, rows, mode) for mode in MODES}}


def main(arguments: list[str] | None = None) -> None:
    """Print all figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.training.video.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, help="only the first clips")
    options = parser.parse_args(arguments)
    print(json.dumps(measure_clips(options.checkpoint, options.limit), indent=2))


if __name__ == "__main__":
    main()
