"""Every decoding feature, cache and wrapper over both sites: right, or refused with the message that the document names."""

import pytest
import transformers
from decoding.matrix import DOCUMENT, NEEDS_GPU, WORKS, cells, outcome, written
from packaging.version import Version

CELLS = list(cells())
# The document is of the newest transformers. Older ones lack caches quantised to fp8, leave images out of chunks, and mix up the
# images of a prompt with two when they search by beams, pruned or not.
OLDER_HOST = Version(transformers.__version__) < Version("5.23")


@pytest.fixture(scope="module")
def document():
    return written(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_cell_is_as_the_document_says(cell, document):
    if OLDER_HOST and "fp8" in cell.cache:
        pytest.skip("this version of transformers has no such cache")
    if OLDER_HOST and cell.target.endswith(", LLaVA") and cell.feature in ("beam search", "several return sequences"):
        pytest.skip("this version of transformers mixes up images when it searches by beams")
    found = outcome(cell)
    if found == NEEDS_GPU:
        pytest.skip("offloaded caches need a GPU")
    if OLDER_HOST and "this version of transformers leaves the images out" in found:
        pytest.skip(found)
    assert found == (WORKS if document[cell.id] == NEEDS_GPU else document[cell.id])


def test_the_document_has_just_these_cells(document):
    assert set(document) == {cell.id for cell in CELLS}
    assert WORKS in document.values()
