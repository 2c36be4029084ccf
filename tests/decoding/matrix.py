"""The cells of the decoding matrix, what each of them gives, and the document that says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from decoding.call import ROWS, Call
from decoding.features import FEATURES
from decoding.hosts import CACHES, WRAPPERS, fresh

import vlmprune
from support.deeper import deeper
from support.families.llava_next import LLAVA_NEXT
from support.families.llava_onevision import LLAVA_ONEVISION
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen2_vl import QWEN2_VL
from support.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from support.families.vip_llava import VIP_LLAVA
from support.tiny_models import LLAVA_CLIP_GQA, FamilyCase
from vlmprune.errors import VlmpruneError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
WORKS, NEEDS_GPU = "works", "needs a GPU, not run"


class Target(NamedTuple):
    """A method on a family."""

    method: str
    case: FamilyCase


TARGETS = {
    "input, LLaVA": Target("divprune", LLAVA_CLIP_GQA),
    "layer, LLaVA": Target("pyramiddrop", deeper(LLAVA_CLIP_GQA)),
    "input, Qwen2.5-VL": Target("divprune", QWEN2_5_VL),
    "layer, Qwen2.5-VL": Target("pyramiddrop", deeper(QWEN2_5_VL)),
}
FAMILIES = {
    "ViP-LLaVA": VIP_LLAVA,
    "LLaVA-NeXT": LLAVA_NEXT,
    "LLaVA-OneVision": LLAVA_ONEVISION,
    "Qwen2-VL": QWEN2_VL,
    "Qwen3-VL": QWEN3_VL,
    "Qwen3-VL-MoE": QWEN3_VL_MOE,
}
SITES = ("input", "layer")
FAMILY_TARGETS = {
    f"{site}, {name}": Target("divprune", case) if site == "input" else Target("pyramiddrop", deeper(case))
    for name, case in FAMILIES.items()
    for site in SITES
}
CACHE_FEATURES = ("greedy search", "beam search", "second turn on the returned cache")
WRAPPER_FEATURES = ("greedy search", "loss with labels, backward")
# `generate` of what `torch.compile` returns is the model's own; tracing takes long and is done once for each.
NOT_TRIED = {
    ("`torch.compile`", "greedy search", "input, LLaVA"),
    ("`torch.compile`", "greedy search", "layer, LLaVA"),
    ("`torch.compile`", "loss with labels, backward", "input, LLaVA"),
    ("compiled `forward`", "loss with labels, backward", "input, LLaVA"),
    ("compiled `forward`", "loss with labels, backward", "layer, LLaVA"),
    ("compiled `forward`", "greedy search", "layer, LLaVA"),
}


class Cell(NamedTuple):
    """One entry of a table."""

    table: str
    row: str
    target: str
    feature: str
    cache: str = "dynamic"
    wrapper: str = "none"

    @property
    def id(self) -> str:
        """What a test is called by."""
        return f"{self.table}-{self.row}-{self.target}"


def cells() -> Iterator[Cell]:
    """Yield every cell, in the order of the document."""
    for feature in FEATURES:
        for target in TARGETS:
            yield Cell("features", feature, target, feature)
    for cache in CACHES:
        for feature in CACHE_FEATURES:
            if cache == "dynamic" or (cache == "none" and feature.startswith("second")):
                continue
            for target in TARGETS:
                yield Cell("caches", f"{cache}: {feature}", target, feature, cache=cache)
    for wrapper in WRAPPERS:
        for feature in WRAPPER_FEATURES if wrapper != "none" else ():
            for target in ("input, LLaVA", "layer, LLaVA"):
                if (wrapper, feature, target) in NOT_TRIED:
                    continue
                yield Cell("wrappers", f"{wrapper}: {feature}", target, feature, wrapper=wrapper)
    for target in FAMILY_TARGETS:
        for feature in ("greedy search", "second turn on the returned cache"):
            yield Cell("families", feature, target, feature)


def outcome(cell: Cell) -> str:
    """Run a cell; return that it works, with which message it is refused, or what the host raises without us as well.

    Anything else that goes wrong is raised.
    """
    if "offloaded" in cell.cache and not torch.cuda.is_available():
        return NEEDS_GPU
    method, case = {**TARGETS, **FAMILY_TARGETS}[cell.target]
    inputs = case.inputs(ROWS)
    with WRAPPERS[cell.wrapper](fresh(case.build(torch.float32))) as model:
        call = Call(case, method, model, inputs, CACHES[cell.cache], lossy=cell.cache.startswith("quantized"))
        with torch.set_grad_enabled(cell.feature.startswith("loss")):
            try:
                call.apply()
                FEATURES[cell.feature](call)
            except VlmpruneError as error:
                return f"{type(error).__name__}: {_short(str(error))}"
            except AssertionError:
                raise
            except Exception as error:
                if _host_raises(type(error), cell, call):
                    return f"transformers itself raises {type(error).__name__}"
                raise
    return WORKS


def _host_raises(kind: type[Exception], cell: Cell, call: Call) -> bool:
    vlmprune.remove(call.model)
    try:
        FEATURES[cell.feature](call)
    except Exception as error:
        return type(error) is kind
    return False


def _short(message: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(message.split()))[0].replace("`", "'")


def written(document: str) -> dict[str, str]:
    """Return what the document says of every cell, by its id."""
    notes = dict(re.findall(r"^\[(\d+)\] `(.*)`$", document, flags=re.M))
    found: dict[str, str] = {}
    table, columns = "", []
    for line in document.splitlines():
        heading = re.match(r"## (\w+)", line)
        if heading:
            table, columns = heading[1].lower(), []
        if not line.startswith("| ") or set(line) <= set("|- "):
            continue
        row, *values = (part.strip() for part in line.strip("|").split("|"))
        if not columns:
            columns = values
            continue
        for column, value in zip(columns, values, strict=True):
            if value:
                note = re.fullmatch(r"refused \[(\d+)\]", value)
                found[f"{table}-{row}-{column}"] = notes[note[1]] if note else value
    return found


INTRODUCTION = """# What works together

Made by `make compatibility` from the tests in `tests/contracts/test_decoding_matrix.py`; a test fails where this page and the
code differ.

- *works*: it gives what the unpatched layers give on the tokens that were kept, checked step by step.
- *refused*: the error named below is raised, by vlmprune or, where it says so, by transformers with and without vlmprune.

Input methods drop visual tokens before the language model (here `divprune`), layer methods between its layers (here
`pyramiddrop`); others of the same site behave alike. Encoder-decoder caches do not occur in these families. Contrastive search,
DoLa, group beams and constrained beams have left transformers for code on its hub and are not tried.
"""


def render(results: dict[Cell, str]) -> str:
    """Return the document."""
    notes: dict[str, int] = {}
    lines = [INTRODUCTION]
    for table in dict.fromkeys(cell.table for cell in results):
        mine = {cell: result for cell, result in results.items() if cell.table == table}
        columns, rows = (list(dict.fromkeys(getattr(cell, name) for cell in mine)) for name in ("target", "row"))
        if table == "families":
            mine = {cell._replace(row=cell.row): result for cell, result in mine.items()}
        lines += [f"## {table.capitalize()}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            entries = []
            for column in columns:
                result = next((value for cell, value in mine.items() if (cell.row, cell.target) == (row, column)), "")
                if result not in ("", WORKS, NEEDS_GPU):
                    result = f"refused [{notes.setdefault(result, len(notes) + 1)}]"
                entries.append(result)
            lines.append(f"| {row} | {' | '.join(entries)} |")
        lines.append("")
    lines += ["## Messages", "", *(f"[{number}] `{message}`\n" for message, number in notes.items())]
    return "\n".join(lines)
