"""How the attention of single vision tower layers is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vlmprune.methods.batch import VisionSignal

from ..calls import CallStack, TowerCall
from ..hooks import HookSet

if TYPE_CHECKING:
    from ..families.family import Family


class TowerReader:
    """Hooks that capture what a signal is computed from, and the computation; the tower keeps its attention backend."""

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register the hooks on the layers that `signals` name; they fill the innermost `TowerCall`."""
        raise NotImplementedError

    def read(self, signal: VisionSignal, call: TowerCall) -> Tensor:
        """Return a signal in fp32, in the shape that the family's `token_vision` takes."""
        raise NotImplementedError
