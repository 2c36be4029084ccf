"""Write the third test set, of screens: `python -m vlmprune.eval.training.common.dataset_screens [--out FILE]`.

Every row is one picture (PNG, 192 x 192, mostly flat) with a question and its answer for each of the five tasks.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from .dataset import TEST_FILE, as_dataset, write_set
from .questions import TASKS
from .scenes import make_scene
from .screens import encode_png, render_screen
from .stream import TEST_SEED

ROWS = 120
SCREENS_FILE = TEST_FILE.with_name("screens.parquet")


def make_rows(rows: int = ROWS, seed: int = TEST_SEED + 2_000_000) -> Dataset:
    """The first `rows` screens for which all five tasks have a question."""
    columns: dict[str, list[object]] = {"image": []}
    columns |= {f"{task}_{part}": [] for task in TASKS for part in ("question", "answer")}
    index = 0
    while len(columns["image"]) < rows:
        rng = np.random.default_rng([seed, index])
        index += 1
        scene = make_scene(rng, test=True)
        asked = {task: question for task, ask in TASKS.items() if (question := ask(scene, rng)) is not None}
        if len(asked) < len(TASKS):
            continue
        columns["image"].append({"bytes": encode_png(render_screen(scene)), "path": None})
        for task, question in asked.items():
            columns[f"{task}_question"].append(question.text)
            columns[f"{task}_answer"].append(question.answer)
    return as_dataset(columns)


def main(arguments: list[str] | None = None) -> None:
    """Write the set and print its checksum."""
    write_set(
        "python -m vlmprune.eval.training.common.dataset_screens", __doc__, make_rows, SCREENS_FILE, ROWS, arguments
    )


if __name__ == "__main__":
    main()
