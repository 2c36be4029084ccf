"""Write the third test set, of screens: `python -m vlmprune.eval.training.common.dataset_screens [--out FILE]`.

Every row is one picture (PNG, 192 x 192, mostly flat) with a question and its answer for each of the five tasks.
"""

from __future__ import annotations

from datasets import Dataset

from . import dataset
from .dataset import TEST_FILE, write_set
from .screens import encode_png, render_screen
from .stream import TEST_SEED

ROWS = 120
SCREENS_FILE = TEST_FILE.with_name("screens.parquet")


def make_rows(rows: int = ROWS, seed: int = TEST_SEED + 2_000_000) -> Dataset:
    """The first `rows` screens for which all five tasks have a question."""
    return dataset.make_rows(rows, seed, lambda scene: encode_png(render_screen(scene)))


def main(arguments: list[str] | None = None) -> None:
    """Write the set and print its checksum."""
    write_set(
        "python -m vlmprune.eval.training.common.dataset_screens", __doc__, make_rows, SCREENS_FILE, ROWS, arguments
    )


if __name__ == "__main__":
    main()
