"""The names of the methods as their files tell them, for the command line, which answers a misspelt one before torch is there."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from .errors import unknown

ENTRY_POINTS = "vlmprune.methods"
"""The group under which other packages offer methods."""

_NAME = re.compile(r"""^    name(?:: ClassVar\[str\])? = ["']([a-z0-9_]+)["']""", re.MULTILINE)

_STAGE = re.compile(r"^    is_stage(?:: ClassVar\[bool\])? = True", re.MULTILINE)


@cache
def named_in_files() -> tuple[str, ...]:
    """Names that classes in the folders of methods have, and those that installed packages offer, without importing any."""
    files = sorted(Path(__file__).with_name("methods").glob("*/*.py"))
    texts = ((file.stem, file.read_text(encoding="utf-8")) for file in files)
    found = (name for stem, text in texts for name in _NAME.findall(text) if name == stem and not _STAGE.search(text))
    offered = (entry.name for entry in entry_points(group=ENTRY_POINTS))
    return tuple(dict.fromkeys([*found, *offered]))


def check_names(text: str, others: tuple[str, ...] = ()) -> None:
    """Check the names in a list of methods such as `"pool,fastervlm:layer=-2"`.

    Args:
        text: methods by comma, parameters by colon.
        others: what may be named besides methods.

    Raises:
        UnknownNameError: a name is no method.
    """
    known = [*others, *named_in_files()]
    for item in filter(None, (part.strip() for part in text.split(","))):
        name = item.split(":")[0]
        if name not in known:
            raise unknown("method", name, known)
