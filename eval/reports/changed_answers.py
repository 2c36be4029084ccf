"""Answers that pruning changed, beside their pictures and the tokens that were kept."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.eval.run.cells import FULL
from vlmprune.eval.run.figures import keep_text
from vlmprune.eval.run.result_folder import read_json

SHOWN = 12
"""Changed answers on the page for each cell."""
EDGE = 224


def changed_answers(folder: Path) -> str:
    """HTML of the changed answers of a run on own data; empty for other runs."""
    file = folder / "prompts.json"
    if not file.is_file():
        return ""
    prompts = read_json(file)
    cells = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    full = next((cell for cell in cells if cell["method"] == FULL), None)
    if full is None:
        return ""
    right = {sample["doc_id"]: sample for sample in _samples(full)}
    return "<h3>Changed answers</h3>\n" + "".join(_cell(cell, right, prompts) for cell in cells if cell is not full)


def _samples(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [sample for task in cell["tasks"].values() for sample in task["samples"]]


def _cell(cell: Mapping[str, Any], full: Mapping[int, Mapping[str, Any]], prompts: Sequence[Any]) -> str:
    changed = [sample for sample in _samples(cell) if not sample["same"]]
    shown = changed[:SHOWN]
    rows = "".join(_row(sample, full[sample["doc_id"]], prompts[sample["doc_id"]]) for sample in shown)
    head = "<tr><th>picture, kept tokens bright</th><th>prompt</th><th>unpruned</th><th>pruned</th></tr>"
    title = f"{escape(cell['title'])} {keep_text(cell['keep'])}: {len(changed)} of {len(full)} changed"
    more = f", the first {len(shown)} here, all under cells/" if len(shown) < len(changed) else ""
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if shown else ""
    return f"<details><summary>{title}{more}</summary>{table}</details>\n"


def _row(sample: Mapping[str, Any], full: Mapping[str, Any], prompt: Mapping[str, Any]) -> str:
    kept = sample.get("kept") or []
    pictures = "".join(
        _thumbnail(path, kept[place] if len(kept) == len(prompt["images"]) else None)
        for place, path in enumerate(prompt["images"])
    )
    texts = (prompt["prompt"], full["answer"], sample["answer"])
    cells = "".join(f'<td style="white-space:normal">{escape(text)}</td>' for text in texts)
    return f"<tr><td>{pictures}</td>{cells}</tr>\n"


def _thumbnail(path: str, kept: Sequence[Any] | None) -> str:
    """The picture with what was dropped darkened, as far as its tokens are one raster; words where the file is gone."""
    try:
        picture = Image.open(path).convert("RGB")
    except OSError:
        return f"{escape(Path(path).name)} is gone"
    picture.thumbnail((EDGE, EDGE))
    if kept is not None:
        rows, columns, tokens = kept
        mask = Image.new("L", (columns, rows), 70)
        for token in tokens:
            mask.putpixel((token % columns, token // columns), 255)
        dark = Image.new("RGB", picture.size)
        picture = Image.composite(picture, dark, mask.resize(picture.size, Image.Resampling.NEAREST))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{escape(Path(path).name)}" style="width:auto" src="data:image/jpeg;base64,{encoded}">'
