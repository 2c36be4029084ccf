"""The names of the methods, and how a method is made from a name and parameters."""

from __future__ import annotations

from typing import Any, TypeVar

from ..errors import ParameterError, unknown
from ..method_files import ENTRY_POINTS
from ..plugins import load_plugins
from . import attention, baselines, encoder, input, layer, video
from .attention_method import AttentionMethod
from .base import Method
from .encoder_method import EncoderMethod
from .input_method import InputMethod
from .layer_method import LayerMethod

MethodT = TypeVar("MethodT", bound=Method)

METHODS: dict[str, type[Method]] = {}
"""Every method of this package and those that were registered, in the order of tables; see `known_methods`."""


def register(cls: type[MethodT]) -> type[MethodT]:
    """Make a method known by its name, to `apply`, the command line and the tables; also as a decorator of a class.

    Raises:
        ParameterError: it is no method, or another one has that name.
    """
    check_method_class(cls)
    other = METHODS.setdefault(cls.name, cls)
    if other is not cls:
        raise ParameterError(
            f"{cls.__qualname__} is called {cls.name!r}, as {other.__module__}.{other.__qualname__} is; take another name."
        )
    return cls


def check_method_class(cls: type) -> None:
    """Raise ParameterError unless `cls` derives from one of the kinds of methods and has a name."""
    if not (isinstance(cls, type) and issubclass(cls, (EncoderMethod, InputMethod, LayerMethod, AttentionMethod))):
        raise ParameterError(
            f"{cls!r} is no method; derive it from vlmprune.methods.EncoderMethod, InputMethod, LayerMethod or AttentionMethod."
        )
    if not isinstance(getattr(cls, "name", None), str):
        raise ParameterError(
            f"{cls.__qualname__} has no `name: ClassVar[str]`, by which `apply` and the tables know it."
        )


for _folder in (baselines, encoder, input, video, layer, attention):
    for _cls in vars(_folder).values():
        if isinstance(_cls, type) and issubclass(_cls, Method) and not _cls.is_stage:
            register(_cls)


def known_methods() -> dict[str, type[Method]]:
    """Return every method that can be asked for by name, those of installed packages (`vlmprune.plugins`) last."""
    _load_offered()
    return METHODS


def _load_offered() -> dict[str, str]:
    return load_plugins(ENTRY_POINTS, "method", _register_offered)


def _register_offered(name: str, cls: Any) -> None:
    check_method_class(cls)
    if cls.name != name:
        raise ParameterError(f"its class {cls.__qualname__} is called {cls.name!r}; entry point and name must agree.")
    register(cls)


def method_names() -> list[str]:
    """Return the names of all methods, baselines first."""
    return list(known_methods())


def get_method(name: str) -> type[Method]:
    """Return the method class of that name.

    Raises:
        UnknownNameError: if there is none; names the nearest match.
        ParameterError: a package offers it, but it cannot be loaded from there.
    """
    if name not in METHODS:
        broken = _load_offered()
        if name in broken:
            raise ParameterError(broken[name])
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
        check_method_class(type(method))
        return method
    cls = method if isinstance(method, type) else get_method(method)
    check_method_class(cls)
    if keep is not None:
        parameters["keep"] = keep
    return cls(**parameters)  # type: ignore[arg-type]
