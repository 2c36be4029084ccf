"""Every decoding feature, cache and wrapper over both sites: right, or refused with the message that the document names."""

import pytest
from decoding.matrix import DOCUMENT, NEEDS_GPU, WORKS, cells, outcome, written

CELLS = list(cells())


@pytest.fixture(scope="module")
def document():
    return written(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_cell_is_as_the_document_says(cell, document):
    found = outcome(cell)
    if found == NEEDS_GPU:
        pytest.skip("offloaded caches need a GPU")
    assert found == (WORKS if document[cell.id] == NEEDS_GPU else document[cell.id])


def test_the_document_has_just_these_cells(document):
    assert set(document) == {cell.id for cell in CELLS}
    assert WORKS in document.values()
