"""`vlmprune show`: what methods keep of the user's own pictures, and what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

import vlmprune
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.eval.run.cells import FULL, Cell

from .figure import figure_of
from .panels import Panel, whole_panel
from .plot import panels_of, patch_size_of, records_of_prompt, seen_by_tower
from .sources import is_video, read_picture, read_video
from .tower_pictures import PictureError

CAPTION_WIDTH = 44
FORMATS = frozenset({".png", ".svg", ".pdf", ".jpg"})


@dataclass(frozen=True)
class ShowOptions:
    """What to show.

    Attributes:
        images: pictures and clips, all in one prompt.
        prompt: what is asked about them.
        cells: methods and budgets, a panel each; methods in stages have one a stage.
        out: the file to write.
        scores: add heat maps for the methods that rank by a score.
        new_tokens: length of the answers.
    """

    images: Sequence[Path]
    prompt: str
    cells: Sequence[Cell]
    out: Path
    scores: bool = False
    new_tokens: int = 32


def check_show(options: ShowOptions) -> None:
    """Raise PictureError for what can be told before a model is loaded."""
    if options.out.suffix.lower() not in FORMATS:
        raise PictureError(f"--out {str(options.out)!r} is no picture file; allowed: {', '.join(sorted(FORMATS))}.")
    if not options.out.parent.is_dir():
        raise PictureError(f"--out {str(options.out)!r}: the folder {str(options.out.parent)!r} does not exist.")
    for image in options.images:
        if not image.is_file():
            raise PictureError(f"The picture {str(image)!r} does not exist.")


def run_show(loaded: LoadedModel, options: ShowOptions) -> list[str]:
    """Write the picture; returns the answers, that of the unpruned model first.

    Raises:
        PictureError: a picture cannot be read or drawn.
    """
    check_show(options)
    shown = [read_video(path) if is_video(path) else read_picture(path) for path in options.images]
    modalities = ["video" if is_video(path) else "image" for path in options.images]
    inputs = _inputs(loaded, shown, modalities, options.prompt)
    patch_size = patch_size_of(loaded.model)
    seen = [seen_by_tower(kind, item, loaded.processor) for kind, item in zip(modalities, shown, strict=True)]
    answers = [_answer(loaded, inputs, options.new_tokens)]
    rows: list[list[Panel]] = [[] for _ in shown]
    for cell in options.cells:
        with cell.applied_to(loaded.model):
            answers.append(_answer(loaded, inputs, options.new_tokens))
            records = records_of_prompt(vlmprune.last_run(loaded.model), len(shown))
        for row, record, pictures in zip(rows, records, seen, strict=True):
            if not row:
                row.append(_with_answer(whole_panel(record.layout, pictures, patch_size, FULL), answers[0]))
            scored = options.scores and record.scores is not None
            panels = panels_of(record, pictures, patch_size, cell.label, scored)
            row.extend([_with_answer(panels[0], answers[-1]), *panels[1:]])
    figure_of(rows).savefig(options.out)
    return answers


def _with_answer(panel: Panel, answer: str) -> Panel:
    return replace(panel, caption=f"{panel.caption}\n{fill(answer, CAPTION_WIDTH, max_lines=4)}")


def _inputs(loaded: LoadedModel, shown: Sequence[Any], modalities: Sequence[str], prompt: str) -> Any:
    content = [{"type": modality} for modality in modalities] + [{"type": "text", "text": prompt}]
    try:
        text = loaded.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        given: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        for modality, name in (("image", "images"), ("video", "videos")):
            mine = [item for item, kind in zip(shown, modalities, strict=True) if kind == modality]
            if mine:
                given[name] = mine
        inputs = loaded.processor(**given)
    except (ValueError, TypeError, OSError) as error:
        raise PictureError(f"The processor refuses the pictures: {error}") from error
    return inputs.to(loaded.model.device, dtype=loaded.model.dtype)


def _answer(loaded: LoadedModel, inputs: Any, new_tokens: int) -> str:
    with torch.no_grad():
        out = loaded.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = loaded.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return text.strip()
