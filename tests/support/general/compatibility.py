"""What of vlmprune serves a class of transformers, found out by building the class small and running the contracts on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import vlmprune
from support.general.host_case import HostCase, build
from support.general.shrunk import model_class
from support.general.tower_order import check_tower_order
from vlmprune.errors import UnsupportedFamilyError, VlmpruneError
from vlmprune.methods.registry import METHODS
from vlmprune.patches.families.registry import find_family

ROWS: list[list[int | str]] = [[3, "A", 4], [5, "B", 6]]
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "models.md"
_GROUPS = {
    "features": "divprune",
    "geometry": "pool",
    "decoder": "fastv",
    "tower": "fastervlm",
    "blocks": "tome",
}
_STEPS = 4
_CLOSE = {"atol": 3e-4, "rtol": 1e-3}


@dataclass(frozen=True)
class Served:
    """A row of the table.

    Attributes:
        name: the class.
        family: who serves it: the name of a family, "general", or nothing.
        modalities: what it is served with.
        sites: where methods act.
        methods: their names.
        note: why it is not served, or what is left out.
    """

    name: str
    family: str = ""
    modalities: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    note: str = ""


def served(name: str) -> Served:
    """Return what serves a class; contracts that fail are an AssertionError.

    A class that cannot be built small, or that vlmprune refuses, is a row that says why.
    """
    try:
        case = build(name)
    except UnsupportedFamilyError as error:
        return Served(name, note=_sentence(error))
    except Exception:
        refused = _refused(name)
        return Served(name, note=refused or "not tried: neither its configuration nor its pixels are made small here")
    try:
        family = find_family(case.model)
    except VlmpruneError as error:
        return Served(name, note=_sentence(error))
    methods = vlmprune.list_methods(case.model)
    notes = []
    keeps = host_keeps_rows_apart(case)
    if not keeps:
        notes.append("the class itself gives a row of a batch other logits than alone")
    try:
        run_contracts(case, "divprune", keeps)
        if "fastv" in methods:
            run_contracts(case, "fastv", keeps)
        if family.is_general and "fastervlm" in methods:
            run_contracts(case, "fastervlm", keeps)
            check_tower_order(case, ROWS)
    except VlmpruneError as error:
        return Served(name, note=_sentence(error))
    if family.is_general and family.decoder_gap:
        notes.append(family.decoder_gap)
    sites = tuple(dict.fromkeys(METHODS[method].site for method in methods))
    kind = "general" if family.is_general else family.name
    return Served(name, kind, family.modalities, sites, tuple(methods), "; ".join(notes))


def host_keeps_rows_apart(case: HostCase) -> bool:
    """Return whether the unpatched class gives a row of a left-padded batch what it gives it alone."""
    batch = case.inputs(ROWS)
    with torch.no_grad():
        together = case.model(**batch).logits
        return all(
            torch.allclose(
                together[row, batch["attention_mask"][row].bool()],
                case.model(**case.inputs([items])).logits[0],
                **_CLOSE,
            )
            for row, items in enumerate(ROWS)
        )


def run_contracts(case: HostCase, method: str, rows_apart: bool = True) -> None:
    """Run the contracts with one method: identity, undo, shapes, batch = singles, `generate`, a shorter cache.

    Raises:
        AssertionError: one of them does not hold.
    """
    model, batch = case.model, case.inputs(ROWS)
    parameters: dict[str, Any] = {"layer": 1} if method == "fastv" else {}
    before = _state(model)
    with torch.no_grad():
        plain = model(**batch).logits
        with vlmprune.pruned(model, method, keep=1.0):
            assert torch.equal(model(**batch).logits, plain), "identity"
        assert _state(model) == before, "undo"
        keep = 0.5 if method == "divprune" else 0.7
        with vlmprune.pruned(model, method, keep=keep, **parameters):
            output = model(**batch, use_cache=True)
            run = vlmprune.last_run(model)
            assert output.logits.shape == plain.shape, "shapes"
            kept = [image.kept_tokens if hasattr(image, "kept_tokens") else len(image.kept) for image in run.images]
            assert sum(kept) < sum(case.tokens(str(row[1])) for row in ROWS), "nothing was dropped"
            words = _words(case, batch)
            held = _longest(output.past_key_values)
            assert held is None or held < batch["input_ids"].shape[1], "cache"
            for row, items in enumerate(ROWS):
                alone = case.inputs([items])
                logits, words_alone = model(**alone).logits[0], _words(case, alone)[0]
                if rows_apart:
                    valid = batch["attention_mask"][row].bool()
                    torch.testing.assert_close(output.logits[row, valid], logits, **_CLOSE)
                    assert torch.equal(words[row], words_alone), "generate"
        assert torch.equal(model(**batch).logits, plain), "undo"
        assert _state(model) == before, "undo"


def _words(case: HostCase, inputs: dict[str, Any]) -> torch.Tensor:
    made: torch.Tensor = case.model.generate(**inputs, max_new_tokens=_STEPS, min_new_tokens=_STEPS, do_sample=False)
    return made[:, -_STEPS:]


def _longest(cache: Any) -> int | None:
    """Return the entries of the last layer that has any."""
    layers = [
        layer
        for layer in cache.layers
        if isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.ndim == 4
    ]
    return None if not layers else int(layers[-1].keys.shape[2])


def _state(model: Any) -> list[Any]:
    return [
        (path, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ]


def _refused(name: str) -> str:
    """Return why vlmprune refuses a class whose pixels nobody here knows, from a model without weights; "" if it does not."""
    from support.general.hosts import CHANGES
    from support.general.shrunk import shrunk_config

    cls: Any = model_class(name)
    try:
        with torch.device("meta"):
            model = cls(shrunk_config(cls, **CHANGES.get(name, {})))
    except Exception:
        return ""
    try:
        find_family(model)
    except VlmpruneError as error:
        return _sentence(error)
    return ""


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and not isinstance(error, VlmpruneError):
        text = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return text.split(" Supported: ")[0].removesuffix(".")[:300]


def classes() -> list[str]:
    """Return the classes of the image-text-to-text mapping of the installed transformers, by name."""
    return sorted({name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() if model_class(name)})


def version() -> str:
    """Return the major and minor version of the installed transformers."""
    return ".".join(transformers.__version__.split(".")[:2])


def document_version() -> str:
    """Return the version of transformers that the checked-in table was made with."""
    found = re.search(r"transformers (\d+\.\d+)", DOCUMENT.read_text(encoding="utf-8"))
    return found[1] if found else ""


def group(methods: tuple[str, ...]) -> str:
    """Return a short name of a set of methods, by what the methods need."""
    named = [title for title, needed in _GROUPS.items() if needed in methods]
    return ", ".join(named)


def line(row: Served) -> str:
    """Return the row of the table."""
    if not row.family:
        return f"| `{row.name}` | no | | | | {row.note.replace('|', '/')} |"
    family, note = row.family, row.note.replace("|", "/")
    return f"| `{row.name}` | {family} | {', '.join(row.modalities)} | {', '.join(row.sites)} | {group(row.methods)} | {note} |"


def render(rows: list[Served]) -> str:
    """Return the page."""
    count = sum(bool(row.family) for row in rows)
    return f"""# Model classes

Made by `make models` with transformers {version()}: every class of its image-text-to-text mapping, built small with random
weights, with identity, undo, batch = singles, shapes, `generate` and a shorter cache under `divprune`, and `fastv` where it is
served; where a tower was found, under `fastervlm` too, and that scores stand at the tokens that are made of the patches scored.
A test fails where a class does otherwise than its row. {count} of {len(rows)} classes are served.

"general" means by what was found in the class (`print(vlmprune.explain(model))` says what, and what is missing); other names
are families of their own. Methods: **features** need the visual tokens alone (`random`, `uniform`, `divprune`), **geometry**
their places too (`pool`), **decoder** queries and keys of the decoder's layers (`fastv`, `pyramiddrop`), **tower** attention
of the vision tower (`fastervlm`), **blocks** its blocks (`tome`). `vlmprune.list_methods(model)` names them for one model.

| class | served | modalities | sites | methods by need | what is left out, or why it is not served |
|---|---|---|---|---|---|
""" + "".join(f"{line(row)}\n" for row in rows)
