"""Write the second test set, of larger pictures: ``python -m vlmprune.eval.tiny.large [--out FILE]``.

Every row is one picture (JPEG, 288 x 192) and the question what its text says. A glyph is as many pixels as in the first
test set, so it takes a smaller part of the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value

from .batches import TEST_SEED
from .dataset import TEST_FILE, sha256
from .questions import ask_reading
from .scenes import encode_jpeg, make_scene, render

ROWS = 240
WIDTH, HEIGHT = 288, 192
LARGE_FILE = TEST_FILE.with_name("scenes_large.parquet")


def make_rows(rows: int = ROWS, seed: int = TEST_SEED + 1_000_000) -> Dataset:
    """The first ``rows`` scenes of larger pictures."""
    columns: dict[str, list[object]] = {"image": [], "reading_question": [], "reading_answer": []}
    for index in range(rows):
        rng = np.random.default_rng([seed, index])
        scene = make_scene(rng, WIDTH, test=True, tall=HEIGHT)
        question = ask_reading(scene, rng)
        columns["image"].append({"bytes": encode_jpeg(render(scene)), "path": None})
        columns["reading_question"].append(question.text)
        columns["reading_answer"].append(question.answer)
    features = Features({name: Image() if name == "image" else Value("string") for name in columns})
    return Dataset.from_dict(columns, features=features)


def main(arguments: list[str] | None = None) -> None:
    """Write the set and print its checksum."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.tiny.large", description=__doc__)
    parser.add_argument("--out", type=Path, default=LARGE_FILE)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    make_rows(options.rows).to_parquet(str(options.out))
    print(sha256(options.out), options.out)


if __name__ == "__main__":
    main()
