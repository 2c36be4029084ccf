"""Write and read the test set: ``python -m vlmprune.eval.tiny.dataset [--out FILE]``.

Every row is one picture (JPEG) with a question and its answer for each of the five tasks. The scenes come from seeds that no
training stage uses, and the printed strings from the part of all strings that no training picture shows.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value

from .batches import TEST_SEED
from .questions import TASKS
from .scenes import encode_jpeg, make_scene, render

ROWS = 600
TEST_FILE = Path(__file__).parents[1] / "tasks" / "data" / "scenes.parquet"
TEST_SHA256 = "19e94db019c7980176c6c34674d14a9eb1fae6d7b6e16eca75bbced4edf0a407"
"""Checksum of the shipped file (the pictures do not depend on the machine, the parquet container may)."""


def make_rows(rows: int = ROWS, seed: int = TEST_SEED) -> Dataset:
    """The first ``rows`` test scenes for which all five tasks have a question."""
    columns: dict[str, list[object]] = {"image": []}
    columns |= {f"{task}_{part}": [] for task in TASKS for part in ("question", "answer")}
    index = 0
    while len(columns["image"]) < rows:
        rng = np.random.default_rng([seed, index])
        index += 1
        scene = make_scene(rng, test=True)
        found = {task: ask(scene, rng) for task, ask in TASKS.items()}
        asked = {task: question for task, question in found.items() if question is not None}
        if len(asked) < len(TASKS):
            continue
        columns["image"].append({"bytes": encode_jpeg(render(scene)), "path": None})
        for task, question in asked.items():
            columns[f"{task}_question"].append(question.text)
            columns[f"{task}_answer"].append(question.answer)
    features = Features({name: Image() if name == "image" else Value("string") for name in columns})
    return Dataset.from_dict(columns, features=features)


def load_rows(file: Path = TEST_FILE) -> Dataset:
    """The test set as a ``datasets.Dataset``."""
    return Dataset.from_parquet(str(file))


def sha256(file: Path = TEST_FILE) -> str:
    """Checksum of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Write the test set and print its checksum."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.tiny.dataset", description=__doc__)
    parser.add_argument("--out", type=Path, default=TEST_FILE)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    make_rows(options.rows).to_parquet(str(options.out))
    print(sha256(options.out), options.out)


if __name__ == "__main__":
    main()
