"""The names of the methods, and how a method is made from a name and parameters."""

from __future__ import annotations

from dataclasses import fields

from ..errors import ParameterError, unknown
from . import baselines, input, layer
from .base import Method

METHODS: dict[str, type[Method]] = {cls.name: cls for folder in (baselines, input, layer) for cls in folder.METHODS}


def method_names() -> list[str]:
    """Return the names of all methods, baselines first."""
    return list(METHODS)


def get_method(name: str) -> type[Method]:
    """Return the method class of that name.

    Raises:
        UnknownNameError: if there is none; names the nearest match.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def make_method(method: str | Method | type[Method], keep: object = None, **parameters: object) -> Method:
    """Return `method` as an object: made from a name or class and its parameters, or checked as it is.

    Raises:
        UnknownNameError: unknown method or parameter.
        ParameterError: parameters beside an object that already carries its own.
        BudgetError: bad `keep`.
    """
    if isinstance(method, Method):
        if keep is not None or parameters:
            given = ", ".join((["keep"] if keep is not None else []) + list(parameters))
            raise ParameterError(
                f"{given} given beside the object {method!r}; set it on the object: {type(method).__name__}(keep=...)."
            )
        return method
    cls = method if isinstance(method, type) and issubclass(method, Method) else get_method(method)
    allowed = [item.name for item in fields(cls)]
    for name in parameters:
        if name not in allowed:
            raise unknown(f"parameter of {cls.name}", name, allowed)
    if keep is not None:
        parameters["keep"] = keep
    return cls(**parameters)  # type: ignore[arg-type]
