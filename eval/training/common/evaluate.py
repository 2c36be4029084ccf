"""Accuracy of a tiny model on the test set: with all visual tokens, blind, and with a few random tokens.

`python -m vlmprune.eval.training.common.evaluate CHECKPOINT [--limit N]`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

import vlmprune

from .dataset import TEST_FILE, load_rows, make_scenes
from .dataset_large import LARGE_FILE
from .oracle import only_foreground, random_of_same_count
from .questions import TASKS
from .scenes import Scene

MODES = ("full", "blind", "random")
ORACLE_MODES = ("foreground", "same_count")
GREY = (128, 128, 128)


def prompt(processor: ProcessorMixin, question: str) -> str:
    """The question with its picture in the model's chat format."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def same(answer: str, wanted: str) -> bool:
    """Exact match but for case and outer blanks."""
    return answer.strip().lower() == wanted.strip().lower()


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    mode: str = "full",
    keep: float = 0.05,
    seed: int = 0,
    batch_size: int = 32,
    tasks: Sequence[str] = tuple(TASKS),
    masks: Sequence[Tensor] | None = None,
) -> dict[str, float]:
    """Share of right answers of each of the `tasks`.

    `blind` replaces every picture by uniform grey; `random` keeps a random share `keep` of each picture's visual tokens
    (drawn from `seed`). `foreground` keeps exactly what each row's entry in `masks` says, bool `[tokens]`, and
    `same_count` as many tokens, drawn at random.
    """
    modes = MODES if masks is None else (*MODES, *ORACLE_MODES)
    if mode not in modes:
        raise ValueError(f"mode is {mode!r}, not one of {', '.join(modes)}")
    hits = dict.fromkeys(tasks, 0)
    for task, part in tqdm(list(_parts(tasks, len(rows), batch_size)), desc=mode, mininterval=5):
        chosen = rows[part]
        with _pruned(model, mode, keep, seed, [masks[i] for i in part] if masks else []):
            pictures = [Image.new("RGB", p.size, GREY) if mode == "blind" else p for p in chosen["image"]]
            prompts = [prompt(processor, question) for question in chosen[f"{task}_question"]]
            inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            answers = processor.batch_decode(output, skip_special_tokens=True)
            hits[task] += sum(map(same, answers, chosen[f"{task}_answer"]))
    return {task: count / len(rows) for task, count in hits.items()}


def measure_folder(
    folder: Path, large: bool, foreground: Callable[[Scene], Tensor], limit: int | None = None
) -> dict[str, Any]:
    """Accuracy of a checkpoint folder in all modes on the test set and, with `large`, on the larger pictures.

    Names of figures on these begin with `large_`. `foreground` is that of `measure_oracle`.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    sets: dict[str, tuple[Path, tuple[str, ...]]] = {"": (TEST_FILE, tuple(TASKS))}
    if large:
        sets["large_"] = (LARGE_FILE, ("reading",))
    figures: dict[str, Any] = {"parameters": model.num_parameters()}
    for prefix, (file, tasks) in sets.items():
        rows = load_rows(file)
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        figures[f"{prefix}items"] = len(rows)
        for mode in MODES:
            figures[f"{prefix}{mode}"] = measure(model, processor, rows, mode, batch_size=16, tasks=tasks)
    figures.update(measure_oracle(model, processor, foreground, limit))
    return figures


def measure_oracle(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    foreground: Callable[[Scene], Tensor],
    limit: int | None = None,
    modes: Sequence[str] = ORACLE_MODES,
    batch_size: int = 16,
    tasks: Sequence[str] = tuple(TASKS),
) -> dict[str, Any]:
    """Accuracy in the modes on the first `limit` test items, all by default, and how many visual tokens show something.

    `foreground` tells which do in a scene's picture.
    """
    rows = load_rows()
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    masks = [foreground(scene) for scene, _ in make_scenes(len(rows))]
    figures: dict[str, Any] = {
        mode: measure(model, processor, rows, mode, batch_size=batch_size, tasks=tasks, masks=masks) for mode in modes
    }
    shown = sum(int(mask.sum()) for mask in masks) / len(masks)
    return {**figures, "visual_tokens": len(masks[0]), "foreground_tokens": shown}


def _pruned(
    model: PreTrainedModel, mode: str, keep: float, seed: int, masks: Sequence[Tensor]
) -> AbstractContextManager[object]:
    if mode == "random":
        return vlmprune.pruned(model, "random", keep=keep, seed=seed)
    if mode == "foreground":
        return only_foreground(model, masks)
    return random_of_same_count(model, masks, seed) if mode == "same_count" else nullcontext()


def _parts(tasks: Sequence[str], rows: int, batch_size: int) -> Iterator[tuple[str, range]]:
    for task in tasks:
        for begin in range(0, rows, batch_size):
            yield task, range(begin, min(begin + batch_size, rows))


def main(arguments: list[str] | None = None) -> None:
    """Print all figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.training.common.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    rows = load_rows()
    if options.limit:
        rows = rows.select(range(min(options.limit, len(rows))))
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=options.dtype).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    print(
        json.dumps(
            {mode: measure(model, processor, rows, mode) for mode in options.modes} | {"items": len(rows)}, indent=2
        )
    )


if __name__ == "__main__":
    main()
