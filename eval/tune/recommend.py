"""A first guess without measuring: what was measured on a small model of the same family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.api import list_methods
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.patches.families.registry import find_family

DEFAULTS = Path(__file__).with_name("measured") / "defaults.json"


@dataclass(frozen=True)
class Recommendation:
    """A method and budget to begin with.

    Attributes:
        method: its name.
        keep: its budget.
        line: Python to paste.
        sentence: where it comes from; it always says that it is a first guess.
    """

    method: str
    keep: float
    line: str
    sentence: str


def recommend(model: Any) -> Recommendation:
    """Name a method and budget for a model at once, from shipped measurements; nothing is run.

    Args:
        model: a model of a supported family, or what `load_model` gives.

    Raises:
        UnsupportedFamilyError: it belongs to no supported family.
    """
    inner = model.model if isinstance(model, LoadedModel) else model
    family = find_family(inner)
    content = json.loads(DEFAULTS.read_text(encoding="utf-8"))
    served = list_methods(inner)
    found = content["models"].get(family.config.model_type)
    if found is not None and found["method"] in served:
        sentence = (
            f"A first guess: on {found['model']} it kept {100 * found['of_full']:.0f} % of the accuracy for "
            f"{100 * found['flops']:.0f} % of the FLOPs to the first token. Your model and data may differ: "
            "`vlmprune tune` measures them."
        )
    else:
        found = content["otherwise"]
        sentence = (
            f"A first guess: nothing was measured on models of type {family.config.model_type!r}. "
            "`vlmprune tune` measures yours."
        )
    line = f'vlmprune.apply(model, "{found["method"]}", keep={found["keep"]})'
    return Recommendation(found["method"], found["keep"], line, sentence)
