"""The setting of a served model: `--hf-overrides '{"vlmprune": {"method": "divprune", "keep": 0.25}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import vlmprune
from vlmprune.errors import ParameterError
from vlmprune.methods.base import Method
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.registry import make_method

from .refusals import check_method

KEY = "vlmprune"


@dataclass(frozen=True)
class ServedMethod:
    """The method that prunes the images of a served model.

    Attributes:
        method: what selects.
        identity: tells caches of vLLM apart which hold images that were pruned in another way.
    """

    method: InputMethod

    @property
    def identity(self) -> str:
        """Version, method and all parameters."""
        return f"vlmprune {vlmprune.__version__} {self.method!r}"


def read_setting(config: Any) -> ServedMethod | None:
    """Return the setting in a model's configuration; None where there is none.

    Raises:
        ParameterError: the setting is no mapping with a method.
        UnknownNameError: there is no such method or parameter.
        BudgetError: bad `keep`.
        UnsupportedMethodError: vLLM cannot be served with the method.
    """
    setting = getattr(config, KEY, None)
    if setting is None:
        return None
    return ServedMethod(check_method(made_method(setting)))


def made_method(setting: object) -> Method:
    """Return the method that a setting names.

    Raises:
        ParameterError: the setting is no mapping with a method.
        UnknownNameError: there is no such method or parameter.
        BudgetError: bad `keep`.
    """
    example = '{"vlmprune": {"method": "divprune", "keep": 0.25}}'
    if not isinstance(setting, Mapping) or not isinstance(setting.get("method"), str):
        raise ParameterError(
            f"hf-overrides has vlmprune={setting!r}; needed: a method and its parameters, as in {example}."
        )
    parameters = {name: value for name, value in setting.items() if name != "method"}
    # Lists are what JSON makes of tuples.
    return make_method(
        setting["method"],
        **{name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()},
    )
