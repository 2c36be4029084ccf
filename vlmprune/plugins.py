"""Methods and families of other packages, found by their entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import VlmpruneWarning


@cache
def load_plugins(group: str, kind: str, register: Callable[[str, Any], object]) -> dict[str, str]:
    """Register what installed packages offer under the entry points of a group; once a process.

    An entry point is `name = "package.module:Class"`. One that cannot be loaded is warned about and left out, so that a broken
    package breaks nothing but what it offers.

    Args:
        group: of entry points.
        kind: what they offer, for the words of errors.
        register: what makes an object known by its entry point's name; raises where that cannot be.

    Returns:
        What is wrong with those that cannot be loaded, by their names.
    """
    broken: dict[str, str] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            register(entry.name, entry.load())
        except Exception as error:  # Whatever the code of another package raises.
            broken[entry.name] = f"{_origin(entry)} offers the {kind} {entry.name!r}, which cannot be loaded: {error}"
            warnings.warn(broken[entry.name], VlmpruneWarning, stacklevel=2)
    return broken


def _origin(entry: EntryPoint) -> str:
    return f"The package {entry.dist.name}" if entry.dist is not None else f"{entry.value!r}"
