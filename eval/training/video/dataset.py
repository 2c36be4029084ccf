"""Write and read the clips' test set: `python -m vlmprune.eval.training.video.dataset [--out FILE]`.

Every row is one clip, "motion" and "arrivals" in turn, with a question and its answer for each task that it has one for. A clip's
different frames are stored once each (JPEG); `order` says which of them follow each other. The clips come from seeds that no
training stage uses, and the printed strings from the part of all strings that no training clip shows. A clip is left out where
an answer of it has been the right one often enough: all answers to a question are right about equally often.
"""

from __future__ import annotations

from collections import Counter
from math import ceil

import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value

from ..common.dataset import TEST_FILE, write_set
from ..common.questions import Question
from ..common.scenes import MAX_COUNT, SHAPES, encode_jpeg
from ..common.stream import TEST_SEED
from .clips import KINDS, MOMENTS, make_clip, render_clip
from .questions import CLIP_TASKS

ROWS = 320
CLIP_FILE = TEST_FILE.with_name("clips.parquet")
CLIP_SHA256 = "79ae5f435b76288e1958606aecebce0d7afaf7d8451620b28608586f2801f1cf"
"""Checksum of the shipped file (the frames do not depend on the machine, the parquet container may)."""


def make_rows(rows: int = ROWS, seed: int = TEST_SEED + 2_000_000) -> Dataset:
    """The first `rows` test clips."""
    columns: dict[str, list[object]] = {"frames": [], "order": [], "kind": []}
    columns |= {f"{task}_{part}": [] for task in CLIP_TASKS for part in ("question", "answer")}
    each = ceil(rows / len(KINDS))
    most = {
        "motion": each / len(SHAPES),
        "order": each * 3 / 4 / len(SHAPES),
        "counting": each / MAX_COUNT,
        "happened": each / 2,
    }
    answered: Counter[tuple[str, str, str]] = Counter()
    index = 0
    while len(columns["kind"]) < rows:
        rng = np.random.default_rng([seed, index])
        index += 1
        kind = KINDS[len(columns["kind"]) % len(KINDS)]
        # Four moments are too few for four things that come one by one.
        shortest = MOMENTS[0] + (kind == "arrivals")
        clip = make_clip(rng, kind, int(rng.integers(shortest, MOMENTS[1] + 1)), test=True)
        asked = {task: ask(clip, rng) for task, ask in CLIP_TASKS.items()}
        keys = [(task, kind, question.answer) for task, question in asked.items() if question and task in most]
        if any(answered[key] >= ceil(most[key[0]]) for key in keys):
            continue
        answered.update(keys)
        pictures, order = render_clip(clip)
        columns["frames"].append([{"bytes": encode_jpeg(picture), "path": None} for picture in pictures])
        columns["order"].append(order)
        columns["kind"].append(kind)
        _add_questions(columns, asked)
    kinds = {"frames": Sequence(Image()), "order": Sequence(Value("int64"))}
    return Dataset.from_dict(columns, features=Features({name: kinds.get(name, Value("string")) for name in columns}))


def _add_questions(columns: dict[str, list[object]], asked: dict[str, Question | None]) -> None:
    for task, question in asked.items():
        columns[f"{task}_question"].append(question.text if question else "")
        columns[f"{task}_answer"].append(question.answer if question else "")


def main(arguments: list[str] | None = None) -> None:
    """Write the test set and print its checksum."""
    write_set("python -m vlmprune.eval.training.video.dataset", __doc__, make_rows, CLIP_FILE, ROWS, arguments)


if __name__ == "__main__":
    main()
