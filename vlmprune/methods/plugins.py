"""Methods of other packages, found by their entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ..errors import ParameterError, VlmpruneWarning
from ..method_files import ENTRY_POINTS
from .base import Method


@cache
def load_plugins(register: Callable[[type[Method]], type[Method]]) -> dict[str, str]:
    """Register the methods that installed packages offer under the entry points `vlmprune.methods`; once a process.

    An entry point is `name = "package.module:Class"` with the name of the method. One that cannot be loaded is warned about
    and left out, so that a broken package breaks its own methods alone.

    Args:
        register: what makes a class known.

    Returns:
        What is wrong with those that cannot be loaded, by their names.
    """
    broken: dict[str, str] = {}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            _load(entry, register)
        except Exception as error:  # Whatever the code of another package raises.
            broken[entry.name] = f"{_origin(entry)} offers the method {entry.name!r}, which cannot be loaded: {error}"
            warnings.warn(broken[entry.name], VlmpruneWarning, stacklevel=2)
    return broken


def _load(entry: EntryPoint, register: Callable[[type[Method]], type[Method]]) -> None:
    cls = entry.load()
    name = getattr(cls, "name", None)
    if isinstance(cls, type) and issubclass(cls, Method) and name != entry.name:
        raise ParameterError(f"its class {cls.__qualname__} is called {name!r}; entry point and name must agree.")
    register(cls)


def _origin(entry: EntryPoint) -> str:
    return f"The package {entry.dist.name}" if entry.dist is not None else f"{entry.value!r}"
