"""Several processes that share one benchmark (`accelerate launch -m vlmprune bench ...`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlmprune.errors import VlmpruneError

T = TypeVar("T")


class RankError(VlmpruneError, RuntimeError):
    """Another process failed, or the processes were started differently."""


class Ranks:
    """The processes of this run; with one process every method does the obvious thing.

    The process group is accelerate's own, as lmms-eval uses it.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            if state.num_processes != self.count or not dist.is_initialized():
                raise RankError(
                    f"{self.count} processes were started, but accelerate sees {state.num_processes}; start them with "
                    "accelerate launch --multi_gpu (on CPUs too) or torchrun."
                )

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def on_main(self, call: Callable[[], T]) -> T:
        """`call` in the first process only; every process gets its value, or raises its error."""
        if self.count == 1:
            return call()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box = [call(), None]
            except Exception as error:
                box = [None, f"{type(error).__name__}: {error}"]
                dist.broadcast_object_list(box, 0)
                raise
        dist.broadcast_object_list(box, 0)
        if box[1] is not None:
            raise RankError(f"The first process stopped with {box[1]}")
        value: T = box[0]
        return value

    def main_first(self, call: Callable[[], T]) -> T:
        """`call` in every process, in the first one before the others (which then find its caches)."""
        if self.count == 1:
            return call()
        if self.is_main:
            value = call()
            dist.barrier()
        else:
            dist.barrier()
            value = call()
        return value

    def gathered(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in every process."""
        if self.count == 1:
            return list(items)
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def require_same(self, what: str, value: Any) -> None:
        """Raise `RankError` in every process unless all of them have the same `value`."""
        values = self.gathered([value])
        if any(other != values[0] for other in values):
            shown = "; ".join(f"process {rank}: {other!r}" for rank, other in enumerate(values))
            raise RankError(f"The processes disagree about {what}: {shown}"[:2000])

    def close(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            dist.barrier()
