"""The base of every method: a frozen dataclass with one selecting function on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, ClassVar, Literal

from ..budget import Keep
from ..errors import unknown, unknown_parameter
from .needs import STILL_IMAGES, Need

Site = Literal["encoder", "input", "layer", "attention"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to reduce the visual tokens of a prefill; `EncoderMethod`, `InputMethod` and `LayerMethod` are its kinds.

    Attributes:
        keep: share of visual tokens kept, a float in (0, 1], or the number kept per image, an int; None where the
            method's own parameters fix it.
        name: the name that `apply` takes (a class attribute, as are all that follow).
        site: where the method acts.
        needs: what it needs of a model or a call.
        merges: whether kept tokens get other values.
        symbols: how the symbols of its paper are spelt here, for the error that names them.
        is_stage: whether it is only a stage of another method, and not offered by name.
    """

    keep: Keep | None = None

    name: ClassVar[str]
    site: ClassVar[Site]
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES})
    merges: ClassVar[bool] = False
    symbols: ClassVar[Mapping[str, str]] = {}
    is_stage: ClassVar[bool] = False

    def __new__(cls, *args: Any, **parameters: Any) -> Any:
        """Check the names of the parameters before the dataclass takes them."""
        # Here and not in `__init__`, which is the dataclass's own and would raise a TypeError that helps nobody.
        cls.check_parameters(parameters)
        return super().__new__(cls)

    @classmethod
    def check_parameters(cls, parameters: Mapping[str, Any]) -> None:
        """Check the names of parameters.

        Raises:
            UnknownNameError: there is no such parameter; names the nearest, or what a symbol of the paper is here.
        """
        taken = signature(cls.__init__).parameters
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values()):
            return
        allowed = list(taken)[1:]
        for name in parameters:
            if name in allowed:
                continue
            if name in cls.symbols:
                raise unknown_parameter(cls.name, name, cls.symbols[name], allowed)
            raise unknown(f"parameter of {cls.name}", name, allowed)

    def parts(self) -> tuple[Method, ...]:
        """Return the stages of a method that acts at several sites; itself by default."""
        return (self,)
