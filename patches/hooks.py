"""Named hooks on one model instance, removable exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Hook:
    """One entry of a `HookSet`.

    Attributes:
        name: what the hook is for, unique in its set.
        kind: "before", "after", or the name of the attribute that was replaced.
        module: the module that carries it.
        undo: takes it away.
    """

    name: str
    kind: str
    module: nn.Module
    undo: Callable[[], None]


class HookSet:
    """The hooks and replaced attributes of one applied method; `remove` leaves every module as it was.

    Only instances are touched, never classes. A `forward` that accelerate has replaced on the instance stays in place.
    A deep copy of the model takes its own hooks along, provided that hooks are bound methods (or partials of such) and no
    closures, which a copy would share with the original.
    """

    def __init__(self) -> None:
        self._hooks: dict[str, Hook] = {}

    def before(self, name: str, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before `module`'s forward."""
        self._add(name, "before", module, module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, name: str, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Call `hook(module, args, kwargs, output)` after `module`'s forward; with `always` also after an exception in it."""
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always)
        self._add(name, "after", module, handle.remove)

    def replace(self, name: str, module: nn.Module, attribute: str, value: object) -> None:
        """Set an instance attribute that is not a parameter or submodule."""
        had, previous = attribute in module.__dict__, module.__dict__.get(attribute)
        module.__dict__[attribute] = value
        self._add(name, attribute, module, partial(_restore, module, attribute, had, previous))

    def remove(self) -> None:
        """Undo everything, last added first."""
        while self._hooks:
            self._hooks.popitem()[1].undo()

    def described(self, model: nn.Module) -> list[tuple[str, str, str]]:
        """Return `(path of the module in model, kind, name)` of every hook, in the order in which they were added."""
        paths = {module: path for path, module in model.named_modules(remove_duplicate=True)}
        return [
            (paths.get(hook.module) or type(hook.module).__name__, hook.kind, hook.name)
            for hook in self._hooks.values()
        ]

    def _add(self, name: str, kind: str, module: nn.Module, undo: Callable[[], None]) -> None:
        if name in self._hooks:
            undo()
            raise ValueError(f"A hook named {name!r} is already registered.")
        self._hooks[name] = Hook(name, kind, module, undo)

    def __repr__(self) -> str:
        return f"HookSet({', '.join(self._hooks)})"


def _restore(module: nn.Module, attribute: str, had: bool, previous: object) -> None:
    if had:
        module.__dict__[attribute] = previous
    else:
        del module.__dict__[attribute]
