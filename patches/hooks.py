"""Named hooks on one model instance, removable exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vlmprune.errors import UnsupportedCallError


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
        self._watched: list[tuple[nn.Module, str, nn.Module]] = []

    def before(self, name: str, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before `module`'s forward."""
        self._add(name, "before", module, module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(
        self, name: str, module: nn.Module, hook: Callable[..., Any], *, always: bool = False, first: bool = False
    ) -> None:
        """Call `hook(module, args, kwargs, output)` after `module`'s forward.

        Args:
            name: what the hook is for.
            module: the module.
            hook: what is called.
            always: also after an exception in the forward.
            first: ahead of the hooks that the module has already.
        """
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always, prepend=first)
        self._add(name, "after", module, handle.remove)

    def replace(self, name: str, module: nn.Module, attribute: str, value: object) -> None:
        """Set an instance attribute that is not a parameter or submodule."""
        had, previous = attribute in module.__dict__, module.__dict__.get(attribute)
        module.__dict__[attribute] = value
        self._add(name, attribute, module, partial(_restore, module, attribute, had, previous))

    def child(self, module: nn.Module, attribute: str) -> nn.Module:
        """Return a submodule that is to be hooked, and have `check_in_place` make sure that it stays where it is."""
        child: nn.Module = getattr(module, attribute)
        self._watched.append((module, attribute, child))
        return child

    def check_in_place(self) -> None:
        """Raise UnsupportedCallError if a hooked submodule was replaced, by an adapter say, so that its hooks miss something."""
        for module, attribute, child in self._watched:
            current = getattr(module, attribute, None)
            if current is not child:
                raise UnsupportedCallError(
                    f"`{attribute}` of a {type(module).__name__} was replaced since `apply`: {type(child).__name__} then, "
                    f"{type(current).__name__} now. Call vlmprune.remove(model) and apply the method again."
                )

    def remove(self) -> None:
        """Undo everything, last added first."""
        if self._hooks:
            forget_compiled()
        while self._hooks:
            self._hooks.popitem()[1].undo()
        self._watched.clear()

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

    def __len__(self) -> int:
        return len(self._hooks)

    def __repr__(self) -> str:
        return f"HookSet({', '.join(self._hooks)})"


def forget_compiled() -> None:
    """Have compiled code made anew, all of it: `torch.compile` does not notice hooks that come or go later.

    Without it a model that ran compiled before `apply` goes on unpruned. It costs nothing where nothing was compiled.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _restore(module: nn.Module, attribute: str, had: bool, previous: object) -> None:
    if had:
        module.__dict__[attribute] = previous
    else:
        del module.__dict__[attribute]
