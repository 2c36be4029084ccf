"""Every answer of a benchmark on its page: to be searched there, and linked as files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlmprune.eval.run.figures import keep_text
from vlmprune.eval.run.result_folder import read_json

MOST_ANSWERS = 50_000
"""More than that make a page too heavy to open; they are linked alone."""
SHOWN = 200

SCRIPT = """
<script>
function findAnswers(field) {
  const box = field.closest("section"), words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  box.answers = box.answers || JSON.parse(box.querySelector("script").textContent);
  const found = words.length ? box.answers.filter(line => words.every(word => line.join(" ").toLowerCase().includes(word))) : [];
  box.querySelector("tbody").replaceChildren(...found.slice(0, SHOWN).map(line => {
    const row = document.createElement("tr");
    line.forEach(text => { const cell = row.insertCell(); cell.textContent = text; cell.className = "words"; });
    return row;
  }));
  box.querySelector("output").textContent = words.length ? `${found.length} found` : "";
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => part.open = true));
</script>
""".replace("SHOWN", str(SHOWN))


def answers_section(folder: Path, page: Path) -> str:
    """HTML with a field to search all answers of the run in `folder`, and links from `page`'s folder to its files."""
    files = sorted((folder / "cells").glob("*.json"))
    if not files:
        return ""
    cells = [read_json(file) for file in files]
    links = ", ".join(
        f'<a href="{escape(os.path.relpath(file, page).replace(os.sep, "/"))}">{escape(cell["label"])}</a>'
        for file, cell in zip(files, cells, strict=True)
    )
    lines = [line for cell in cells for line in _lines(cell)]
    field = (
        _search(lines) if len(lines) <= MOST_ANSWERS else f"<p>{len(lines)} answers are too many to search here.</p>"
    )
    files_list = f"<details><summary>Files with all answers</summary><p>{links}</p></details>"
    return f"<section><h3>Answers</h3>\n{field}{files_list}</section>\n"


def _lines(cell: dict[str, Any]) -> list[list[str]]:
    name = f"{cell['title']} {keep_text(cell['keep'])}"
    return [
        [
            name,
            task,
            str(sample["doc_id"]),
            str(sample["answer"]),
            "none" if sample["score"] is None else f"{sample['score']:g}",
        ]
        for task, result in cell["tasks"].items()
        for sample in result["samples"]
    ]


def _search(lines: Sequence[Sequence[str]]) -> str:
    data = json.dumps(lines, ensure_ascii=False).replace("</", "<\\/")
    return (
        f"<p><label>Search {len(lines)} answers by method, task, item or words "
        f'<input type="search" oninput="findAnswers(this)"></label> <output></output></p>\n'
        "<table><thead><tr><th>method</th><th>task</th><th>item</th><th>answer</th><th>score</th></tr></thead>"
        f'<tbody></tbody></table>\n<script type="application/json">{data}</script>\n'
    )
