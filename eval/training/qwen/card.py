"""Finish a training run: export the checkpoint, measure it, write its model card."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

import vlmprune

from ..common.dataset import load_rows
from ..common.dataset_large import LARGE_FILE
from ..common.evaluate import GREY, measure, prompt, same
from ..common.questions import TASKS
from ..common.scenes import IMAGE_SIZE
from ..llava.card import accuracy_row, common_fields, stage_times, this_machine
from .model import export
from .stages import STAGES, Workshop

NAME = "tiny-qwen2.5-vl"
KEEP = 0.05

CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
---
# tiny-qwen2.5-vl

A really trained, very small Qwen2.5-VL ({parameters:.2f} M parameters, {megabytes:.1f} MB in bf16) for developing and testing
visual-token pruning where no large model can be loaded: `Qwen2_5_VLForConditionalGeneration` with a tower of 6 layers of
width 128 (patch 8, windows of 64 px, full attention in layers 2 and 5, 2 x 2 merger) and a language model of 6 layers of
width 128 with M-RoPE. Resolution is dynamic: one visual token covers 16 x 16 px, so a picture of 192 x 192 px has 144 of them
and one of 288 x 192 px has 216. It knows nothing but the procedural scenes of `vlmprune.eval.training`: coloured shapes and one
printed string on a textured background.

```python
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

model = Qwen2_5_VLForConditionalGeneration.from_pretrained("eval/checkpoints/tiny-qwen2.5-vl")
processor = AutoProcessor.from_pretrained("eval/checkpoints/tiny-qwen2.5-vl")
```
Prompt: `USER: <|vision_start|><|image_pad|><|vision_end|>{{question}} ASSISTANT:` (the chat template makes it). Greedy decoding.

## Accuracy
Exact match in per cent on {items} pictures of `eval/tasks/data/scenes.parquet` (192 x 192 px, one question of each task a
picture, {items} items a task), through the real processor and `generate`, weights as shipped, run in fp32. *Blind*: the
picture is replaced by uniform grey. *5 % random*: 7 of the 144 visual tokens, drawn at random, are kept
(`vlmprune.apply(model, "random", keep=0.05)`). Nothing was trained with dropped tokens.

| task | question | all tokens | blind | 5 % random | guessing |
|---|---|---|---|---|---|
{table}
{large}
## Data
Training pictures are drawn on the fly from seeds below those of the test set and JPEG-coded as the test pictures are; one
in ten of all strings (by checksum) is printed in test pictures only. They come in several sizes (128 x 128 to 192 x 288 px,
wide and tall; the tower started on 64 to 128 px). Existence asks for a pair of colour and shape that, when absent, occurs in
two halves; relation is asked either way round. Glyphs sit on the 8 px patch grid, so most lie across several visual tokens.

## Training
`python -m vlmprune.eval.training.qwen.train`, on {machine}: {minutes:.0f} minutes summed over the stages, of which the tower's
and the language model's ran side by side. Muon for the matrices of the layers, AdamW for the rest.

| stage | steps | seconds |
|---|---|---|
{stages}

- The language model **starts from tiny-llava's** (same tokens, same geometry, attention biases zero). Its code of visual
  tokens, a vector for each label of a patch, was read off tiny-llava's projector by least squares.
- Tower and merger, from nothing: cross-entropy on what each patch and each merged token shows (shape, colour, glyph, place in
  the string, centre of a thing), and regression of the merged tokens to that code.
- Language model: on symbolic tokens (sums of the code) at M-RoPE positions, layers only. Beside the answers, the attention of
  2 of the 4 heads of its second layer was taught to look at the tokens that a shape's word names (in front of the picture
  when it names none), and linear probes asked each visual token for its row and column after the first layer, shapes' words
  for the place of what they name after the second, and the second shape's word for the way to the first after the fourth.
  This makes its text-to-image attention cleaner than that of a model that learned from answers alone; **methods that score
  by it may profit**.
- Then everything together on pictures and answers, with the tower's label losses and the probes beside them and without any
  loss on the language model's attention.
- `mrope_section` is [1, 2, 13] and the rotary base 1e5: at this width rows and columns need frequencies that turn visibly
  within 12 to 20 steps.

## Limits
A model for tests and for comparing pruning methods cheaply; its figures say nothing about large models. It does not
understand free questions, only the five forms in the table, and was not trained on several pictures or videos at once. In
pictures larger than it was trained on (up to 384 x 384 px, the processor's limit) it still answers, but counts and compares
places less well.{limits}
"""

LARGE = """
Strings in larger pictures (`eval/tasks/data/scenes_large.parquet`, 288 x 192 px, 216 visual tokens, {items} items): {full:.1f}
with all tokens, {random:.1f} with 5 % random.
"""


def finish(out: Path, folder: Path | None = None, stage: str = STAGES[-1], rows: int | None = None) -> dict[str, Any]:
    """Export the weights of a stage (the last) to `folder` (`out/tiny-qwen2.5-vl`), measure the files, write the card."""
    folder = folder or out / NAME
    shop = Workshop(out)
    shop.load(stage)
    export(shop.model, folder)
    figures = measure_folder(folder, rows)
    figures["stages"] = stage_times(out, STAGES)
    (out / "figures.json").write_text(json.dumps(figures, indent=2))
    (folder / "README.md").write_text(write_card(figures, folder))
    return figures


def measure_folder(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """All figures of the model card, through the checkpoint's files."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor, rows = AutoProcessor.from_pretrained(folder), load_rows()
    if limit:
        rows = rows.select(range(min(limit, len(rows))))
    figures: dict[str, Any] = {"full": measure(model, processor, rows), "blind": measure_blind(model, processor, rows)}
    with vlmprune.pruned(model, "random", keep=KEEP):
        figures["random"] = measure(model, processor, rows)
    figures |= {"items": len(rows), "parameters": model.num_parameters()}
    if LARGE_FILE.exists():
        figures["large"] = measure_large(model, processor, limit)
    return figures


@torch.no_grad()
def measure_blind(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Dataset, batch_size: int = 32
) -> dict[str, float]:
    """What `measure` gives with `mode="blind"`, but every question is asked once: the grey pictures are all the same."""
    grey, shares = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), GREY), {}
    for task in TASKS:
        wanted = Counter(zip(rows[f"{task}_question"], rows[f"{task}_answer"], strict=True))
        questions = sorted({question for question, _ in wanted})
        said: dict[str, str] = {}
        for begin in range(0, len(questions), batch_size):
            part = questions[begin : begin + batch_size]
            prompts = [prompt(processor, question) for question in part]
            inputs = processor(images=[grey] * len(part), text=prompts, padding=True, return_tensors="pt")
            output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            said |= zip(part, processor.batch_decode(output, skip_special_tokens=True), strict=True)
        hits = sum(number for (question, answer), number in wanted.items() if same(said[question], answer))
        shares[task] = hits / len(rows)
    return shares


def measure_large(model: PreTrainedModel, processor: ProcessorMixin, limit: int | None = None) -> dict[str, float]:
    """Share of strings read in the larger test pictures, with all tokens and with few."""
    rows = load_rows(LARGE_FILE)
    if limit:
        rows = rows.select(range(min(limit, len(rows))))
    full = measure(model, processor, rows, tasks=("reading",))["reading"]
    with vlmprune.pruned(model, "random", keep=KEEP):
        random = measure(model, processor, rows, tasks=("reading",))["reading"]
    return {"full": full, "random": random, "items": len(rows)}


def write_card(figures: dict[str, Any], folder: Path, machine: str | None = None) -> str:
    """The model card with the measured figures."""
    large = figures.get("large")
    return CARD.format(
        large=LARGE.format(items=large["items"], full=100 * large["full"], random=100 * large["random"])
        if large
        else "",
        table="\n".join(accuracy_row(figures, task) for task in TASKS),
        machine=machine or this_machine(),
        **common_fields(figures, folder),
    )
