"""What the scene tasks' YAML files call: pictures, which scenes a task asks about, and scores.

lmms-eval loads this file by its path, so it imports nothing of the package around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

Document = dict[str, Any]


def normalise(text: str) -> str:
    """Lower case, without blanks, full stop or quotation marks around the answer, and with single blanks inside."""
    return re.sub(r"\s+", " ", text.strip().strip(" .!\"'`").lower())


def scene_image(document: Document) -> list[Image.Image]:
    """The scene's picture."""
    return [document["image"].convert("RGB")]


def exact_match(question: str) -> Callable[[Document, Sequence[str]], dict[str, float]]:
    """A scorer that gives 1 if the first answer equals the wanted one after `normalise`, else 0."""

    def score(document: Document, answers: Sequence[str]) -> dict[str, float]:
        return {"exact_match": float(normalise(answers[0]) == normalise(str(document[f"{question}_answer"])))}

    return score


def having(question: str) -> Callable[[Any], Any]:
    """A filter that leaves the scenes which have this question."""

    def keep(dataset: Any) -> Any:
        column = dataset[f"{question}_question"]
        present = [i for i, text in enumerate(column) if text]
        return dataset if len(present) == len(column) else dataset.select(present)

    return keep


score_attribute, having_attribute = exact_match("attribute"), having("attribute")
score_existence, having_existence = exact_match("existence"), having("existence")
score_counting, having_counting = exact_match("counting"), having("counting")
score_relation, having_relation = exact_match("relation"), having("relation")
score_reading, having_reading = exact_match("reading"), having("reading")
