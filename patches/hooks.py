"""Named hooks on one model instance, removable exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


class HookSet:
    """The hooks and replaced attributes of one applied method; `remove` leaves every module as it was.

    Only instances are touched, never classes. A `forward` that accelerate has replaced on the instance stays in place.
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
        previous = module.__dict__.get(attribute, _ABSENT)
        module.__dict__[attribute] = value

        def restore() -> None:
            if previous is _ABSENT:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = previous

        self._add(name, restore)

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
