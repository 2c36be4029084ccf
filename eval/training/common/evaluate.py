"""Accuracy of a tiny model on the test set: with all visual tokens, blind, and with a few random tokens.

`python -m vlmprune.eval.training.common.evaluate CHECKPOINT [--limit N]`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .dataset import load_rows
from .questions import TASKS

MODES = ("full", "blind", "random")
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
) -> dict[str, float]:
    """Share of right answers of each of the `tasks`.

    `blind` replaces every picture by uniform grey; `random` keeps a random share `keep` of each picture's visual tokens
    (drawn from `seed`) and leaves the others out of the sequence.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, not one of {', '.join(MODES)}")
    generator = torch.Generator().manual_seed(seed)
    hits = dict.fromkeys(tasks, 0)
    for task, part in tqdm(list(_parts(tasks, len(rows), batch_size)), desc=mode, mininterval=5):
        chosen = rows[part]
        pictures = [Image.new("RGB", p.size, GREY) if mode == "blind" else p for p in chosen["image"]]
        prompts = [prompt(processor, question) for question in chosen[f"{task}_question"]]
        inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt").to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        if mode == "random":
            output = model.generate(**keep_random(model, inputs, keep, generator))
        else:
            output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(output, skip_special_tokens=True)
        hits[task] += sum(map(same, answers, chosen[f"{task}_answer"]))
    return {task: count / len(rows) for task, count in hits.items()}


def keep_random(
    model: PreTrainedModel, inputs: dict[str, Tensor], keep: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Inputs for `generate` in which each row has lost all but a random share of its visual tokens."""
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    visual_inputs = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    features = model.get_image_features(**visual_inputs, return_dict=True).pooler_output
    features = torch.cat(list(features)).to(embeds.dtype)
    visual = ids == model.config.image_token_id
    embeds = embeds.masked_scatter(visual[..., None], features)
    number = int(visual[0].sum())
    kept = ~visual
    for row in range(len(ids)):
        places = visual[row].nonzero()[:, 0]
        order = torch.randperm(number, generator=generator)[: max(1, round(keep * number))]
        kept[row, places[order.to(places.device)]] = True
    width = int(kept[0].sum())
    return {
        "inputs_embeds": embeds[kept].view(len(ids), width, -1),
        "attention_mask": attention[kept].view(len(ids), width),
    }


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
