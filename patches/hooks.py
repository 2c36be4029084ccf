"""Named hooks on one model instance, removable exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class HookSet:
    """The hooks and replaced attributes of one applied method; `remove` leaves every module as it was.

    Only instances are touched, never classes. A `forward` that accelerate has replaced on the instance stays in place.
    A deep copy of the model takes its own hooks along, provided that hooks are bound methods (or partials of such) and no
    closures, which a copy would share with the original.
    """

    def __init__(self) -> None:
        self._undo: dict[str, Callable[[], None]] = {}

    def before(self, name: str, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before `module`'s forward."""
        self._add(name, module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, name: str, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Call `hook(module, args, kwargs, output)` after `module`'s forward; with `always` also after an exception in it."""
        self._add(name, module.register_forward_hook(hook, with_kwargs=True, always_call=always).remove)

    def replace(self, name: str, module: nn.Module, attribute: str, value: object) -> None:
        """Set an instance attribute that is not a parameter or submodule."""
        had, previous = attribute in module.__dict__, module.__dict__.get(attribute)
        module.__dict__[attribute] = value
        self._add(name, partial(_restore, module, attribute, had, previous))

    def remove(self) -> None:
        """Undo everything, last added first."""
        while self._undo:
            self._undo.popitem()[1]()

    def _add(self, name: str, undo: Callable[[], None]) -> None:
        if name in self._undo:
            undo()
            raise ValueError(f"A hook named {name!r} is already registered.")
        self._undo[name] = undo

    def __repr__(self) -> str:
        return f"HookSet({', '.join(self._undo)})"


def _restore(module: nn.Module, attribute: str, had: bool, previous: object) -> None:
    if had:
        module.__dict__[attribute] = previous
    else:
        del module.__dict__[attribute]
