"""Finish a training run: assemble and export the checkpoint, measure it, write its model card."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ..common.dataset import load_rows
from ..common.evaluate import MODES, measure
from ..common.questions import TASKS
from .checkpoint import assemble, export
from .stages import STAGES, Workshop

CHANCE = {"attribute": "1/8", "existence": "1/2", "counting": "about 1/3", "relation": "1/2", "reading": "0"}

CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
---
# tiny-llava

A really trained, very small LLaVA ({parameters:.2f} M parameters, {megabytes:.1f} MB in bf16) for developing and testing
visual-token pruning where no large model can be loaded: `LlavaForConditionalGeneration` with a CLIP tower (192 px, patch 8,
a CLS token and 24 x 24 = 576 visual tokens, 6 layers of width 128, features of layer -2) and a Llama of 6 layers of
width 128. It knows nothing but the procedural scenes of `vlmprune.eval.training`: 4 to 7 coloured shapes and one printed
string on a textured background.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained("eval/checkpoints/tiny-llava")
processor = AutoProcessor.from_pretrained("eval/checkpoints/tiny-llava")
```
Prompt: `USER: <image>\\n{{question}} ASSISTANT:` (the chat template makes it). Greedy decoding.

## Accuracy
Exact match in per cent on the {items} pictures of `eval/tasks/data/scenes.parquet` (one question of each task a picture,
{items} items a task), through the real processor and `generate`, weights as shipped, run in fp32. *Blind*: the picture is
replaced by uniform grey. *5 % random*: 29 of the 576 visual tokens, drawn at random, are kept ({seeds} draw).
Nothing was trained with dropped tokens.

| task | question | all tokens | blind | 5 % random | guessing |
|---|---|---|---|---|---|
{table}

## Data
Training pictures are drawn on the fly from seeds below those of the test set and JPEG-coded as the test pictures are; one
in ten of all strings (by checksum) is printed in test pictures only. Existence asks for a pair of colour and shape that,
when absent, occurs in two halves; relation is asked either way round. Glyphs sit on the 8 px patch grid (a glyph covers
2 x 2 patches); shapes are 26 to 36 px wide and lie anywhere.

## Training
`python -m vlmprune.eval.training.llava.train`, on {machine}: {minutes:.0f} minutes summed over the stages, of which the
tower's and the language model's ran side by side.

| stage | steps | seconds |
|---|---|---|
{stages}

- Tower: cross-entropy on what each patch shows (shape, colour, glyph, place in the string, centre of a thing), on the
  features of layer -2.
- **CLS** was trained to tell which pairs of shape and colour and which glyphs the picture contains (multi-label), with one
  linear head on the last layer's pooled CLS and one on the CLS of layer -2, so its attention in both layers is a trained
  signal, though not a contrastive one.
- Language model: first on symbolic tokens (sums of its own word embeddings). There the attention of 2 of the 4 heads of its
  second layer was taught to look at the patches that a shape's word names (at the tokens in front of the picture when it
  names none), and answers were also asked for at the question's last words. This makes its text-to-image attention
  cleaner than that of a model that learned from answers alone; **methods that score by it may profit**.
- Projector: regression from the tower's features to the symbolic tokens. Then everything together on pictures and answers,
  with the tower's own losses beside them and without any loss on the language model's attention.

## Limits
A model for tests and for comparing pruning methods cheaply; its figures say nothing about large models. It does not
understand free questions, only the five forms in the table.{limits}
"""

QUESTIONS = {
    "attribute": "what colour is the circle?",
    "existence": "is there a red circle?",
    "counting": "how many circles?",
    "relation": "is the red circle left of the blue square? (or: above)",
    "reading": "what does the text say?",
}


def finish(out: Path, folder: Path | None = None, last: str = "joint_more", seeds: int = 1) -> dict[str, Any]:
    """Export the weights of the last stage to `folder` (`out/tiny-llava`), measure the exported files, write the card."""
    folder = folder or out / "tiny-llava"
    shop = Workshop(out)
    shop.load(last)
    export(assemble(shop.tower, shop.projector, shop.language), folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor, rows = AutoProcessor.from_pretrained(folder), load_rows()
    figures: dict[str, Any] = {mode: measure(model, processor, rows, mode) for mode in MODES}
    for seed in range(1, seeds):
        again = measure(model, processor, rows, "random", seed=seed)
        figures["random"] = {task: figures["random"][task] + again[task] for task in TASKS}
    figures["random"] = {task: value / seeds for task, value in figures["random"].items()}
    figures |= {"items": len(rows), "random_seeds": seeds, "parameters": model.num_parameters()}
    figures["stages"] = stage_times(out, STAGES)
    (out / "figures.json").write_text(json.dumps(figures, indent=2))
    (folder / "README.md").write_text(write_card(figures, folder))
    return figures


def stage_times(out: Path, stages: Sequence[str]) -> dict[str, dict[str, float]]:
    """Steps and seconds of every stage of a run."""
    times = {}
    for stage in stages:
        state = torch.load(out / f"{stage}.pt", weights_only=True)
        times[stage] = {"steps": state["step"], "seconds": round(state["seconds"])}
    return times


def write_card(figures: dict[str, Any], folder: Path, machine: str | None = None) -> str:
    """The model card with the measured figures."""
    return CARD.format(
        seeds=figures["random_seeds"],
        table="\n".join(accuracy_row(figures, task) for task in TASKS),
        machine=machine or this_machine(),
        **common_fields(figures, folder),
    )


def accuracy_row(figures: dict[str, Any], task: str, name: str = "", prefix: str = "") -> str:
    """A task's row of the accuracy table, from the figures whose modes' names begin with `prefix`."""
    shares = " | ".join(f"{100 * figures[prefix + mode][task]:.1f}" for mode in MODES)
    return f"| {name or task} | {QUESTIONS[task]} | {shares} | {CHANCE[task]} |"


def common_fields(figures: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields that every model card has: size, test items, stages with their time, and what was not learned."""
    times = figures["stages"]
    return {
        "parameters": figures["parameters"] / 1e6,
        "megabytes": (folder / "model.safetensors").stat().st_size / 1e6,
        "items": figures["items"],
        "limits": _limits(figures),
        "stages": "\n".join(f"| {name} | {time['steps']} | {time['seconds']:.0f} |" for name, time in times.items()),
        "minutes": sum(time["seconds"] for time in times.values()) / 60,
    }


def this_machine() -> str:
    """The machine that a card names where it is told no other."""
    return f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, no GPU"


def _limits(figures: dict[str, Any]) -> str:
    """Which tasks it has not learned: less than five points above blind."""
    weak = [task for task in TASKS if figures["full"][task] < figures["blind"][task] + 0.05]
    return f" It has **not** learned: {', '.join(weak)} (no better than blind)." if weak else ""
