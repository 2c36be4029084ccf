"""How attention, keys and features of a vision tower are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlmprune.methods.batch import VisionSignal

from ..calls import CallStack, TowerCall
from ..hooks import HookSet

if TYPE_CHECKING:
    from ..families.family import Family


class TowerReader:
    """Hooks that capture what a signal is computed from, and the computation; the tower keeps its attention backend."""

    def __init__(self) -> None:
        self.calls = CallStack()

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register the hooks that `signals` need; they fill the innermost `TowerCall`."""
        self.calls = calls
        if any(signal.kind == "features" for signal in signals):
            hooks.before("projector input", family.projector, self._keep_projector_input)

    def read(self, signal: VisionSignal, call: TowerCall) -> Tensor:
        """Return a signal in fp32, in the shape that the family's `token_vision` takes."""
        raise NotImplementedError

    def _keep_projector_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            self.calls.tower[-1].captured["projector input", 0] = args[0] if args else next(iter(kwargs.values()))
