"""Write the second test set, of larger pictures: `python -m vlmprune.eval.training.common.dataset_large [--out FILE]`.

Every row is one picture (JPEG, 288 x 192) and the question what its text says. A glyph is as many pixels as in the first
test set, so it takes a smaller part of the picture.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from .dataset import TEST_FILE, as_dataset, write_set
from .questions import ask_reading
from .scenes import encode_jpeg, make_scene, render
from .stream import TEST_SEED

ROWS = 240
WIDTH, HEIGHT = 288, 192
LARGE_FILE = TEST_FILE.with_name("scenes_large.parquet")


def make_rows(rows: int = ROWS, seed: int = TEST_SEED + 1_000_000) -> Dataset:
    """The first `rows` scenes of larger pictures."""
    columns: dict[str, list[object]] = {"image": [], "reading_question": [], "reading_answer": []}
    for index in range(rows):
        rng = np.random.default_rng([seed, index])
        scene = make_scene(rng, WIDTH, test=True, tall=HEIGHT)
        question = ask_reading(scene, rng)
        columns["image"].append({"bytes": encode_jpeg(render(scene)), "path": None})
        columns["reading_question"].append(question.text)
        columns["reading_answer"].append(question.answer)
    return as_dataset(columns)


def main(arguments: list[str] | None = None) -> None:
    """Write the set and print its checksum."""
    write_set("python -m vlmprune.eval.training.common.dataset_large", __doc__, make_rows, LARGE_FILE, ROWS, arguments)


if __name__ == "__main__":
    main()
