"""The check-lists of CONTRIBUTING.md, kept true: every method and every family stands everywhere it must."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from support.family_cases import FAMILY_CASES
from vlmprune.methods.registry import METHODS
from vlmprune.patches.families.registry import FAMILIES, find_family

ROOT = Path(__file__).parents[2]
PUBLISHED = [name for name, cls in METHODS.items() if ".baselines." not in cls.__module__]
# What it scores by is among the vectors of another method.
VECTORS_OF = {"sink": "var"}


def rows(heading: str) -> list[str]:
    """Return the lines of the first table under a heading of the README."""
    section = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(heading + "\n"))
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def test_the_readme_lists_just_the_methods_that_there_are():
    listed = [row.split("`")[1] for row in rows("Methods") if row.startswith("| `")]
    assert sorted(listed) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_stands_in_the_changelog(name):
    assert f"`{name}`" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_method_has_vectors_of_its_official_code(name):
    assert (ROOT / "tests" / "golden" / VECTORS_OF.get(name, name) / "cases.json").is_file()


def test_vectors_belong_to_methods():
    assert {folder.name for folder in (ROOT / "tests" / "golden").iterdir()} <= set(PUBLISHED)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_file_of_its_own_name_and_tells_its_source(name):
    cls = METHODS[name]
    assert cls.__module__.rsplit(".", 1)[1] == name
    source = inspect.getsource(inspect.getmodule(cls))
    assert name not in PUBLISHED or re.search(r"arXiv[\s:]+\d{4}\.\d{5}", source), "no arXiv id in the docstrings"


def test_the_readme_lists_the_classes_of_every_family():
    table = "\n".join(rows("Models"))
    missing = [name for family in FAMILIES for name in family.model_classes if f"`{name}`" not in table]
    assert not missing


def test_every_family_has_a_tiny_model_in_the_matrix():
    built = {type(find_family(case.build(torch.float32))) for case in FAMILY_CASES}
    assert built == set(FAMILIES)
