"""Bytes of the tensors that a piece of code has alive at once, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operations make while it is active, until nothing refers to them.

    Attributes:
        alive: bytes now.
        peak: most bytes at once.
        largest: elements of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._given: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_flatten((args, kwargs))[0] if _is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if not _is_tensor(leaf):
                continue
            storage = leaf.untyped_storage()
            if storage.data_ptr() in before or storage.data_ptr() in self._given:
                continue
            address, size = storage.data_ptr(), storage.nbytes()
            self._given.add(address)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self.largest = max(self.largest, leaf.numel())
            weakref.finalize(leaf, self._gone, address, size)
        return result

    def _gone(self, address: int, size: int) -> None:
        # A view may live on; its storage is then counted as gone a little early.
        self._given.discard(address)
        self.alive -= size


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
