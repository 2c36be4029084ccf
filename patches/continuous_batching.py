"""Continuous batching, which the host offers for token ids alone, with a cache of its own: refused while a method is applied."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from torch import nn

from vlmprune.errors import UnsupportedCallError

from .hooks import HookSet

_ENTRIES = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class RefusedCall:
    """Stands in for a method of the model that cannot be served."""

    def __init__(self, name: str, call: Any) -> None:
        self.name = name
        self.__signature__ = inspect.signature(call)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say why, and what to do instead."""
        raise UnsupportedCallError(
            f"`{self.name}` takes token ids without images and keeps keys and values in pages, so nothing would be pruned. Call "
            "`generate` with a padded batch, or `vlmprune.remove(model)` first."
        )


def refuse_continuous_batching(model: nn.Module, hooks: HookSet) -> None:
    """Let the model's entries to continuous batching raise UnsupportedCallError."""
    for name in _ENTRIES:
        call = getattr(model, name, None)
        if call is not None:
            hooks.replace(f"continuous batching {name}", model, name, RefusedCall(name, call))
