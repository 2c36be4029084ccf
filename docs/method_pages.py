"""A Sphinx extension: before the documentation is read, it writes a page with a picture for every method, and their list."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from method_losses import REQUIRED, when_it_loses
from PIL import Image

import vlmprune
from vlmprune.errors import VlmpruneError
from vlmprune.eval.models.loading import LoadedModel, load_model
from vlmprune.eval.pictures.plot import plot
from vlmprune.methods.base import Method
from vlmprune.methods.registry import known_methods

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
PHOTOGRAPH = ROOT / "docs" / "pictures" / "astronaut.jpg"
MODELS = ("tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl")
RESULTS = (
    *(ROOT / "eval" / "results" / "all_methods" / f"{model}.csv" for model in MODELS),
    ROOT / "eval" / "results" / "video" / "tiny-qwen2.5-vl-video.csv",
)
PROMPT = "What color is the circle?"
KEEP = 0.25
WHERE = {
    "encoder": "vision tower",
    "input": "before the language model",
    "layer": "inside the language model",
    "attention": "attention",
}


def write(path: str, text: str) -> None:
    """Write a page of the folder of methods."""
    file = METHODS / path
    # Untouched where nothing changed, so that only what did is built again.
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def site_of(cls: type[Method]) -> str:
    """Return where a method acts, in words."""
    return WHERE.get(cls.site, cls.site)


@cache
def results() -> dict[str, list[dict[str, str]]]:
    """Return what was measured on the shipped models, by the model's name."""
    found = {}
    for file in RESULTS:
        with file.open(encoding="utf-8") as text:
            found[file.stem] = list(csv.DictReader(text))
    return found


def measured(name: str) -> Iterator[str]:
    """Yield lines of a table of what was measured of a method on the shipped models."""
    for model, rows in results().items():
        for row in rows:
            if row["method"].split(":")[0] == name:
                values = [
                    model,
                    f"`{row['method']}`",
                    row["keep"],
                    row["visual_tokens_after"],
                    f"{100 * float(row['average']):.1f}",
                    f"{100 * float(row['relative']):.1f} %",
                    f"{float(row['gflops_prefill_total']):.2f}",
                ]
                yield f"| {' | '.join(values)} |"


def picture(loaded: dict[str, LoadedModel], name: str) -> tuple[str, str] | None:
    """Draw what a method keeps of the photograph with the first shipped model that it serves; returns file and caption."""
    with Image.open(PHOTOGRAPH) as file:
        photograph = file.convert("RGB")
    for model_name, each in loaded.items():
        if name not in vlmprune.list_methods(each.model):
            continue
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        text = each.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = each.processor(text=[text], images=[photograph], return_tensors="pt")
        for keep in (KEEP, 0.5, 0.75):
            try:
                with torch.no_grad(), vlmprune.pruned(each.model, name, keep=keep, **REQUIRED.get(name, {})):
                    each.model(**inputs)
                    figure = plot(each.model, photograph, processor=each.processor)
            except VlmpruneError:
                continue
            (METHODS / "pictures").mkdir(parents=True, exist_ok=True)
            figure.savefig(METHODS / "pictures" / f"{name}.jpg", dpi=110)
            return f"pictures/{name}.jpg", f"`keep={keep}` on `{model_name}`"
    return None


def parameters(cls: type[Method]) -> Iterator[str]:
    """Yield lines of a table of parameters, their defaults, and the paper's symbols."""
    symbols: dict[str, Any] = dict(getattr(cls, "symbols", {}))
    for field in fields(cls):
        default = "" if field.default is MISSING else f"`{field.default!r}`"
        spelt = ", ".join(f"`{symbol}`" for symbol, here in symbols.items() if here.startswith(f"{field.name}="))
        yield f"| `{field.name}` | {default} | {spelt} |"


def method_page(name: str, cls: type[Method], loaded: dict[str, LoadedModel]) -> str:
    """Return the page of a method."""
    lines = [f"# {name}", "", f"Where: {site_of(cls)}.", ""]
    drawn = picture(loaded, name)
    if drawn is not None:
        file, caption = drawn
        faded = "dropped patches are faded, merged ones have the colour of their group"
        lines += [f"![What {name} keeps]({file})", "", f"What it keeps of a photograph, {caption}: {faded}.", ""]
    directive = [f".. autoclass:: {cls.__module__}.{cls.__qualname__}", "   :no-members:"]
    lines += ["## What it does", "", "```{eval-rst}", *directive, "```", ""]
    lines += ["## Parameters", "", "| parameter | default | in the paper |", "|---|---|---|", *parameters(cls), ""]
    losses = list(when_it_loses(cls, results()))
    if losses:
        lines += ["## When it loses", "", *(line for loss in losses for line in (loss, ""))]
    rows = list(measured(name))
    if rows:
        columns = ("model", "method", "keep", "visual tokens", "mean accuracy", "of full", "GFLOPs")
        lines += [
            "## Measured",
            "",
            "[How, and against which baselines](../measured.md#methods-compared), "
            "[of videos](../measured.md#video-methods-on-a-trained-model).",
            "",
        ]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows, ""]
    return "\n".join(lines)


def build(_: Any) -> None:
    """Write all pages."""
    loaded = {name: load_model(name, device="cpu") for name in MODELS}
    listing = ["# Methods", "", "| name | what it does | where |", "|---|---|---|"]
    for name, cls in known_methods().items():
        first = (cls.__doc__ or "").strip().splitlines()[0]
        listing.append(f"| [{name}]({name}.md) | {first} | {site_of(cls)} |")
        write(f"{name}.md", method_page(name, cls, loaded))
    toctree = ["```{toctree}", ":hidden:", "", *known_methods(), "```"]
    write("index.md", "\n".join([*listing, "", *toctree]) + "\n")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", build)
    return {"parallel_read_safe": True}
