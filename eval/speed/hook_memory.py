"""The memory that an applied method takes for itself in its own hooks."""

from __future__ import annotations

import torch

from vlmprune.eval.models.memory import PeakMemory

from .hook_clock import HookClock


class HookMemory(HookClock):
    """The most that a hook of a model takes beside what was there when it began; of encoding the pictures nothing counts.

    On a GPU it is what the allocator hands out; on a CPU the growth of the process, which misses what fits into memory that the
    process holds already.

    Attributes:
        most: bytes; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._peak = PeakMemory(device)
        super().__init__(device)

    def reset(self) -> None:
        """Start again."""
        super().reset()
        self.most: int | None = None

    def _switch(self) -> None:
        """Book what was taken since the last switch on what ran until now."""
        if self._running and self._running[-1] == "hooks":
            taken = self._peak.read()
            if taken is not None:
                self.most = max(self.most or 0, taken)
        super()._switch()
        self._peak.start()
