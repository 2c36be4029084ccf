"""Finish the training: assemble and export the checkpoint, measure it, write its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..common.dataset import load_rows
from ..common.dataset_large import LARGE_FILE
from ..common.evaluate import MODES, measure
from ..common.questions import TASKS
from ..llava.card import accuracy_row, common_fields, stage_times
from .checkpoint import assemble, export
from .stages import STAGES, Workshop

CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
---
# tiny-llava-next

A really trained, very small LLaVA-NeXT ({parameters:.2f} M parameters, {megabytes:.1f} MB in bf16) for developing and testing
visual-token pruning on pictures of several tiles where no large model can be loaded: `LlavaNextForConditionalGeneration`
with a CLIP tower (tiles of 96 px, patch 8, a CLS token and 12 x 12 = 144 tokens a tile, 6 layers of width 128, features of
layer -2) and a Llama of 6 layers of width 128. A 192 x 192 picture is 5 tiles (the whole picture at half scale, and 2 x 2
crops) and 744 visual tokens: 144 and 24 rows of 24 with a newline token each. Other canvases: 96 x 192, 192 x 96, 192 x 288
and 288 x 192. It knows nothing but the procedural scenes of `vlmprune.eval.training`: coloured shapes and one printed string on
a textured background.

```python
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

model = LlavaNextForConditionalGeneration.from_pretrained("eval/checkpoints/tiny-llava-next")
processor = AutoProcessor.from_pretrained("eval/checkpoints/tiny-llava-next")
```
Prompt: `USER: <image>\\n{{question}} ASSISTANT:` (the chat template makes it). Greedy decoding.

## Accuracy
Exact match in per cent on the {items} pictures of `eval/tasks/data/scenes.parquet` (one question of each task a picture,
{items} items a task), through the real processor and `generate`, weights as shipped, run in fp32. *Blind*: the picture is
replaced by uniform grey. *5 % random*: 37 of the 744 visual tokens, drawn at random, are kept (1 draw). The last row is
`scenes_reading_large`: {large_items} pictures of 288 x 192 (7 tiles, 1032 tokens; 52 kept). Nothing was trained with
dropped tokens.

| task | question | all tokens | blind | 5 % random | guessing |
|---|---|---|---|---|---|
{table}

## Tiles
In the first tile things have half their size and a glyph is 8 px high; it was trained to show shapes, colours and centres,
and nothing of what is printed. One in four of the strings runs over the edge between two crops, and half of these have a
glyph cut in two: the language model has to put them together, which it does {broken}.

## Data
As for tiny-llava: training pictures are drawn on the fly from seeds below those of the test sets and JPEG-coded; one in ten
of all strings (by checksum) is printed in test pictures only.

## Training
From tiny-llava's weights (a tile has the position embeddings of the middle of its grid):
`python -m vlmprune.eval.training.next.train`, on {machine}, fp32: {minutes:.0f} minutes summed over the stages{together}.

| stage | steps | seconds |
|---|---|---|
{stages}

- Tower: cross-entropy on what each patch of a tile shows (shape, colour, glyph, place in the part of the string that the
  tile shows, centre of a thing), on the features of layer -2. CLS, in the last layer and in layer -2: which pairs of shape
  and colour and which glyphs the tile contains (multi-label).
- Language model: on symbolic tokens (sums of its own word embeddings) of coarse tiles, with the answers and three losses
  beside them: the attention of 2 of the 4 heads of its second layer is taught to look at the patches that a shape's word
  names; answers are also asked for at the question's last words; and its hidden states after three layers must tell, at
  a shape's word, where the thing lies, and at a printed patch, which glyph of the whole string it belongs to. This makes its
  attention cleaner than that of a model that learned from answers alone; **methods that score by it may profit**.
- Projector: regression from the tower's features to the symbolic tokens. Then everything together on pictures and answers,
  with the tower's losses and the one on the hidden states beside them and without any loss on attention; in the last
  stage every second string was made to run over an edge.

## Limits
A model for tests and for comparing pruning methods cheaply; its figures say nothing about large models. It does not
understand free questions, only the five forms in the table.{limits}
"""


def finish(start: Path, out: Path, folder: Path | None = None, **words: str) -> dict[str, Any]:
    """Export the weights of the last stage to `folder` (`out/tiny-llava-next`), measure them and write the card."""
    folder = folder or out / "tiny-llava-next"
    shop = Workshop(start, out)
    shop.load(STAGES[-1])
    export(assemble(shop), folder)
    figures = measure_folder(folder)
    figures["stages"] = stage_times(out, STAGES)
    (out / "figures.json").write_text(json.dumps(figures, indent=2))
    (folder / "README.md").write_text(write_card(figures, folder, **words))
    return figures


def measure_folder(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Accuracy of a checkpoint folder on both test sets, in all modes."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    sets: dict[str, tuple[Dataset, tuple[str, ...]]] = {
        "": (load_rows(), tuple(TASKS)),
        "large_": (load_rows(LARGE_FILE), ("reading",)),
    }
    figures: dict[str, Any] = {"parameters": model.num_parameters()}
    for prefix, (rows, tasks) in sets.items():
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        figures[f"{prefix}items"] = len(rows)
        for mode in MODES:
            figures[f"{prefix}{mode}"] = measure(model, processor, rows, mode, batch_size=16, tasks=tasks)
    return figures


def write_card(
    figures: dict[str, Any],
    folder: Path,
    machine: str = "one CPU core, no GPU",
    together: str = "",
    broken: str = "less well than reading others",
) -> str:
    """The model card with the measured figures."""
    rows = [accuracy_row(figures, task) for task in TASKS]
    rows.append(accuracy_row(figures, "reading", "reading, large", "large_"))
    return CARD.format(
        large_items=figures["large_items"],
        table="\n".join(rows),
        machine=machine,
        together=together,
        broken=broken,
        **common_fields(figures, folder),
    )
