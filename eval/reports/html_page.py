"""One self-contained HTML page from the folders of several runs."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlmprune.eval.run.figures import keep_text, percent, with_quartiles
from vlmprune.eval.run.result_folder import read_json

from .answers_section import SCRIPT, answers_section
from .changed_answers import changed_answers
from .stored_results import ReportError, run_folders
from .summary import NOT_COUNTED
from .tables import paired_texts

Run = dict[str, Any]
Column = tuple[str, Callable[[Run], Any]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td { border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
td.words { white-space: normal; text-align: left; overflow-wrap: anywhere; } .deciding { font-size: 16px; }
.deciding th:nth-child(n+3), .deciding td { white-space: nowrap; } .deciding th { white-space: normal; vertical-align: bottom; }
img { max-width: 48rem; width: 100%; } pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
@media print {
  body { max-width: none; margin: 0; font-size: 9pt; } input, output { display: none; } img { max-width: 100%; }
  table { display: table; overflow: visible; width: 100%; font-size: 7pt; } .deciding { font-size: 8pt; }
  th, td { white-space: normal; overflow-wrap: anywhere; padding: .1rem .25rem; } tr, img { break-inside: avoid; }
  thead { display: table-header-group; }
}
"""


def write_report(folders: Sequence[str | Path], file: str | Path) -> Path:
    """Write the page of all runs to `file`.

    Raises:
        ReportError: a folder has no results, or the file cannot be written.
    """
    folders = run_folders(folders)
    sections = [_section(Path(folder), Path(file).parent) for folder in folders]
    title = "vlmprune: " + ", ".join(Path(folder).resolve().name for folder in folders)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{''.join(sections)}{SCRIPT}</body></html>\n"
    )
    return written(page, file)


def written(text: str, file: str | Path) -> Path:
    """Write a report to `file`, in folders that are made if need be.

    Raises:
        ReportError: it cannot be written.
    """
    target = Path(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"The report {str(file)!r} cannot be written: {error}") from error
    return target


def _section(folder: Path, page: Path) -> str:
    makers = {"results.json": _accuracy, "fidelity.json": _fidelity, "latency.json": _latency}
    parts = []
    for name, make in makers.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            try:
                parts.append(make(content, folder))
                if make is _accuracy:
                    parts.append(answers_section(folder, page))
            except (KeyError, TypeError, AttributeError) as error:
                raise ReportError(f"{str(folder / name)!r} is no result file of vlmprune ({error!r}).") from error
    return f"<h2>{escape(folder.resolve().name)}</h2>\n" + "".join(parts)


def _accuracy(content: Run, folder: Path) -> str:
    cells = content["cells"]
    tasks = list(cells[0]["tasks"])
    accuracy: list[Column] = [
        *_identity(),
        *((name, lambda cell, name=name: _percent(cell["tasks"][name]["score"])) for name in tasks),
        ("mean", lambda cell: _percent(cell["average"])),
    ]
    against = [cell for cell in cells if cell.get("paired")]
    paired: list[Column] = [
        *_identity(),
        *(
            (name, lambda cell, place=place: paired_texts(cell["paired"])[place])
            for place, name in enumerate(("points", "95 %", "of full %", "95 %", "better", "worse", "items"))
        ),
    ]
    cost: list[Column] = [
        *_identity(),
        *(
            (f"GFLOPs {label}", lambda cell, key=key: _giga(cell["cost"]["flops"].get(key, 0)))
            for key, label in FLOPS.items()
        ),
        ("KV MiB", lambda cell: f"{cell['cost']['kv_cache_bytes'] / 2**20:.2f}"),
        ("FastV formula (GMACs)", lambda cell: _giga(cell["cost"]["fastv_formula"])),
        ("PyramidDrop formula (GMACs)", lambda cell: _giga(cell["cost"]["pyramiddrop_formula"])),
        ("prefill ms", lambda cell: _spread(cell.get("timing"), "prefill_ms")),
        ("decode ms/token", lambda cell: _spread(cell.get("timing"), "decode_ms_per_token")),
    ]
    configuration = content["configuration"]
    model = configuration["model"]
    given = configuration.get("limit")
    limit = "all items" if given is None else f"{given} items a task"
    facts = {
        "model": model["source"],
        "loaded as": f"{model['parameters']:,} parameters, {model['dtype']}, {model['device']}, {model['attention']}",
        "tasks": ", ".join(tasks)
        + f" ({limit}, batch size {configuration['batch_size']}, seed {configuration.get('seed', 0)})",
        "image processor": ", ".join(f"{key}={value}" for key, value in model["image_processor"].items()),
        **machine_facts(content["machine"]),
    }
    notes = "; ".join(f"{key}: {value}" for key, value in content["conventions"].items())
    plots = "".join(_picture(path) for path in sorted(folder.glob("accuracy_vs_*.png")))
    return (
        "<h3>What decides</h3>"
        + table_of(_deciding(cells), cells, "deciding")
        + _choice(content)
        + facts_of(facts)
        + "<h3>Accuracy (%)</h3>"
        + table_of(accuracy, cells)
        + ("<h3>Against the unpruned model on the same items</h3>" + table_of(paired, against) if against else "")
        + plots
        + "<h3>Cost of one request</h3>"
        + table_of(cost, cells)
        + changed_answers(folder)
        + _left_out(content)
        + f"<p><small>{escape(notes)}.</small></p>\n<h3>Run it again</h3>\n<pre>{escape(shlex.join(content['command']))}</pre>\n"
    )


def _deciding(cells: Sequence[Run]) -> list[Column]:
    """Few enough columns for a window of 1280 pixels: accuracy with its interval, and what it costs."""
    columns: list[Column] = [
        ("method", lambda cell: cell["title"]),
        ("keep", lambda cell: keep_text(cell["keep"])),
        ("tokens", lambda cell: f"{cell['cost']['visual_tokens_after']:.0f}"),
        ("mean accuracy %", lambda cell: _percent(cell["average"])),
        ("of full %", lambda cell: paired_texts(cell["paired"])[2] if cell.get("paired") else "100"),
        ("95 %", lambda cell: paired_texts(cell["paired"])[3] if cell.get("paired") else "-"),
        ("GFLOPs", lambda cell: _giga(cell["cost"]["flops"]["prefill_total"])),
        ("KV MiB", lambda cell: f"{cell['cost']['kv_cache_bytes'] / 2**20:.2f}"),
    ]
    if any(cell.get("timing") for cell in cells):
        columns.append(("first token ms", lambda cell: _spread(cell.get("timing"), "prefill_ms")))
    return columns


def _choice(content: Run) -> str:
    """The choice that the tables allow."""
    choice = content.get("choice")
    if not choice:
        return ""
    line = f"<pre>{escape(choice['line'])}</pre>\n" if choice["line"] else ""
    return f"{line}<p>{escape(choice['sentence'])}</p>\n"


def _left_out(content: Run) -> str:
    items = "".join(f"<li>{escape(item['note'])}</li>\n" for item in content.get("left_out", []))
    return f"<h3>Left out</h3>\n<ul>{items}</ul>\n" if items else ""


FLOPS = {
    "vision": "tower",
    "projector": "projector",
    "selection": "selection",
    "prefill": "LLM",
    "head": "head",
    "prefill_total": "sum",
    "decode": "decode",
}


def _fidelity(content: Run, folder: Path) -> str:
    columns: list[Column] = [
        ("method", lambda row: row["title"]),
        ("keep", lambda row: keep_text(row["keep"])),
        ("visual tokens", lambda row: f"{row['visual_tokens']:.1f}"),
        ("same answer %", lambda row: _percent(row["same_answer"])),
        ("same first token %", lambda row: _percent(row["same_first_token"])),
        ("KL (nats)", lambda row: f"{row['kl']:.4f}"),
        ("worst KL", lambda row: f"{row['kl_worst']:.3f}"),
    ]
    configuration = content["configuration"]
    facts = {
        "model": configuration["model"]["source"],
        "prompts": configuration["data"]["prompts"],
        **machine_facts(content["machine"]),
    }
    return (
        "<h3>Agreement with the unpruned model</h3>"
        + facts_of(facts)
        + table_of(columns, content["rows"])
        + _left_out(content)
    )


def _latency(content: Run, folder: Path) -> str:
    facts = {
        "model": f"{content['model']} ({content['dtype']}, {content['device']})",
        "request": f"one picture, {content['text_tokens']} text tokens, {content['new_tokens']} new tokens",
        "processes": content.get("processes", 1),
        **machine_facts(content["machine"]),
    }
    return "<h3>Latency</h3>" + facts_of(facts) + table_of(latency_columns(), content["rows"])


def latency_columns() -> list[Column]:
    """The columns of a table of latencies."""
    return [
        ("method", lambda row: row["title"]),
        ("keep", lambda row: keep_text(row["keep"])),
        ("picture", lambda row: "x".join(map(str, row["image_size"]))),
        ("batch", lambda row: row["batch_size"]),
        ("tokens before", lambda row: row["visual_tokens_before"]),
        ("after", lambda row: f"{row['visual_tokens_after']:.0f}"),
        *(
            (label, lambda row, key=key: _spread(row, key))
            for key, label in {
                "vision": "tower ms", "selection": "selection ms", "prefill": "prefill ms", "ideal": "ideal ms",
                "overhead": "over ideal",
                "first_token": "TTFT ms", "decode_per_token": "decode ms/token", "end_to_end": "end to end ms",
            }.items()
        ),
        ("KV MiB", lambda row: f"{row['kv_cache_bytes'] / 2**20:.1f}"),
        ("peak GiB above", lambda row: "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.3g}"),
    ]  # fmt: skip


def _identity() -> list[Column]:
    return [
        ("method", lambda cell: cell["title"]),
        ("keep", lambda cell: keep_text(cell["keep"])),
        ("tokens before", lambda cell: f"{cell['cost']['visual_tokens_before']:.0f}"),
        ("after", lambda cell: f"{cell['cost']['visual_tokens_after']:.1f}"),
    ]


def table_of(columns: Sequence[Column], rows: Iterable[Run], kind: str = "") -> str:
    """Rows as an HTML table of a class."""
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(read(row)))}</td>" for _, read in columns) + "</tr>\n" for row in rows
    )
    named = f' class="{kind}"' if kind else ""
    return f"<table{named}><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def facts_of(facts: Mapping[str, Any]) -> str:
    """Facts, one a line, as HTML."""
    return (
        "<p>" + "<br>\n".join(f"<b>{escape(key)}</b>: {escape(str(value))}" for key, value in facts.items()) + "</p>\n"
    )


def machine_facts(machine: Run) -> dict[str, str]:
    """What `describe_machine` found, in three facts."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    device = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} of {machine['cpus']} cores"
    return {
        "machine": f"{device}; {machine['platform']}",
        "versions": f"vlmprune {machine['vlmprune']}, {versions}",
        "date": machine["date"],
    }


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>\n'


def _percent(value: float | None) -> str:
    return "none" if value is None else percent(value)


def _giga(value: float | None) -> str:
    return NOT_COUNTED if value is None else f"{value / 1e9:,.4g}"


def _spread(row: Run | None, key: str) -> str:
    return with_quartiles((row or {}).get(key))
