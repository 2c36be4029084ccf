"""What the hooks rely on in a model of transformers, as data, and the search for what of it a model lacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Part:
    """Something that a model must have.

    Attributes:
        path: names of attributes by dots from some object on, which is itself the part where there are none; `*` stands for
            every item of a list.
        arguments: names of arguments that it takes, a module in its `forward`.
    """

    path: str = ""
    arguments: tuple[str, ...] = ()


def missing_parts(root: object, parts: Iterable[Part]) -> list[str]:
    """Return what `root` lacks of `parts`, each in words that name the class and the attribute or argument."""
    found: list[str] = []
    for part in parts:
        try:
            for item in _reached(root, [step for step in part.path.split(".") if step]):
                found.extend(_missing_arguments(item, part))
        except AttributeError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _reached(item: object, steps: list[str]) -> Iterator[object]:
    if not steps:
        yield item
    elif steps[0] == "*":
        for inner in item:  # type: ignore[attr-defined]
            yield from _reached(inner, steps[1:])
    else:
        yield from _reached(getattr(item, steps[0]), steps[1:])


def _missing_arguments(item: object, part: Part) -> list[str]:
    if not part.arguments:
        return []
    is_module = isinstance(item, nn.Module)
    # The class's own: what accelerate or torch.compile put on the object takes anything.
    taken = inspect.signature(type(item).forward if is_module else item).parameters  # type: ignore[arg-type, attr-defined]
    name = f"{type(item).__name__}.forward" if is_module else getattr(item, "__qualname__", part.path)
    return [f"{name} takes no argument {argument!r}" for argument in part.arguments if argument not in taken]
