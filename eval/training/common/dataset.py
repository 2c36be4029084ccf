"""Write and read the test set: `python -m vlmprune.eval.training.common.dataset [--out FILE]`.

Every row is one picture (JPEG) with a question and its answer for each of the five tasks. The scenes come from seeds that no
training stage uses, and the printed strings from the part of all strings that no training picture shows.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value

from .questions import TASKS, Question
from .scenes import Scene, encode_jpeg, make_scene, render
from .stream import TEST_SEED

ROWS = 600
TEST_FILE = Path(__file__).parents[2] / "tasks" / "data" / "scenes.parquet"
TEST_SHA256 = "19e94db019c7980176c6c34674d14a9eb1fae6d7b6e16eca75bbced4edf0a407"
"""Checksum of the shipped file (the pictures do not depend on the machine, the parquet container may)."""


def make_scenes(rows: int = ROWS, seed: int = TEST_SEED) -> Iterator[tuple[Scene, dict[str, Question]]]:
    """The first `rows` test scenes for which all five tasks have a question, with these."""
    index = 0
    while rows:
        rng = np.random.default_rng([seed, index])
        index += 1
        scene = make_scene(rng, test=True)
        found = {task: ask(scene, rng) for task, ask in TASKS.items()}
        asked = {task: question for task, question in found.items() if question is not None}
        if len(asked) == len(TASKS):
            rows -= 1
            yield scene, asked


def make_rows(
    rows: int = ROWS,
    seed: int = TEST_SEED,
    picture: Callable[[Scene], bytes] = lambda scene: encode_jpeg(render(scene)),
) -> Dataset:
    """The rows of the test scenes, each picture as the file that `picture` makes of it."""
    columns: dict[str, list[object]] = {"image": []}
    columns |= {f"{task}_{part}": [] for task in TASKS for part in ("question", "answer")}
    for scene, asked in make_scenes(rows, seed):
        columns["image"].append({"bytes": picture(scene), "path": None})
        for task, question in asked.items():
            columns[f"{task}_question"].append(question.text)
            columns[f"{task}_answer"].append(question.answer)
    return as_dataset(columns)


def as_dataset(columns: dict[str, list[object]]) -> Dataset:
    """Columns of pictures (`image`) and strings (all others) as a `datasets.Dataset`."""
    features = Features({name: Image() if name == "image" else Value("string") for name in columns})
    return Dataset.from_dict(columns, features=features)


def load_rows(file: Path = TEST_FILE) -> Dataset:
    """The test set as a `datasets.Dataset`."""
    return Dataset.from_parquet(str(file))


def sha256(file: Path = TEST_FILE) -> str:
    """Checksum of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_set(
    prog: str,
    description: str | None,
    make: Callable[[int], Dataset],
    file: Path,
    rows: int,
    arguments: list[str] | None = None,
) -> None:
    """Write what `make` gives for a number of rows and print its checksum; `file` and `rows` are the defaults."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--out", type=Path, default=file)
    parser.add_argument("--rows", type=int, default=rows)
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    make(options.rows).to_parquet(str(options.out))
    print(sha256(options.out), options.out)


def main(arguments: list[str] | None = None) -> None:
    """Write the test set and print its checksum."""
    write_set("python -m vlmprune.eval.training.common.dataset", __doc__, make_rows, TEST_FILE, ROWS, arguments)


if __name__ == "__main__":
    main()
