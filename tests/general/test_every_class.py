"""Every class of the image-text-to-text mapping: the contracts hold, and docs/models.md says what serves it."""

import pytest

from support.general.compatibility import DOCUMENT, classes, document_version, line, served, version

# One of each kind of what is found: plain, hybrid, masks of the host's own, features by row, refused.
REPRESENTATIVES = (
    "Gemma4UnifiedForConditionalGeneration",
    "GraniteDoclingForConditionalGeneration",
    "JanusForConditionalGeneration",
    "MllamaForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in REPRESENTATIVES else (pytest.mark.whole,)) for name in classes()]
)
def test_the_contracts_hold_as_the_table_says(name):
    row = served(name)
    if version() == document_version():
        assert line(row) in DOCUMENT.read_text(encoding="utf-8").splitlines(), "run `make models`"


def test_sixty_classes_are_served():
    rows = [text for text in DOCUMENT.read_text(encoding="utf-8").splitlines() if text.startswith("| `")]
    assert sum(text.split("|")[2].strip() != "no" for text in rows) >= 60
    if version() == document_version():
        assert [text.split("`")[1] for text in rows] == classes()
